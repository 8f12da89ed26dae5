"""Text encoders with the heads through which they learn (floor 2, torch)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class HeadOutputs:
    """What one reading of a caption says: its meaning ``[B, M]`` and the logits of its truth ``[B, K]``."""

    meaning: torch.Tensor
    truth: torch.Tensor


class TextEncodersWithHeads(nn.Module):
    """Two CLIPs and a T5 with linear heads on exactly what SD3 reads of them.

    That is the last but one hidden state and the pooled projection of the CLIPs, and the last state of T5.
    Token states are read by their mean, so that meaning is spread over the tokens that the MMDiT attends to.
    The last ``cells`` positions of the two CLIPs, side by side, are read one by one: each foretells the
    latents of its cell of the picture.

    Args:
        clips: the two CLIPs.
        t5: the T5 encoder.
        meaning: length of the sentence encoder's vectors.
        truth: how many concepts, styles and grounds there are.
        cells: a square number.
        values: latents in a cell.
    """

    def __init__(
        self, clips: Sequence[Any], t5: Any, meaning: int, truth: int, cells: int, values: int
    ) -> None:
        super().__init__()
        self.clips = nn.ModuleList(clips)
        self.t5 = t5
        widths = [w for c in clips for w in (c.config.hidden_size, c.config.projection_dim)]
        self.heads: Any = nn.ModuleList(
            nn.ModuleList([nn.Linear(w, meaning), nn.Linear(w, truth)]) for w in (*widths, t5.config.d_model)
        )
        for head in self.heads:
            nn.init.constant_(head[1].bias, -5.0)  # few of all things are in a picture
        self.cells = cells
        self.picture = nn.Linear(sum(c.config.hidden_size for c in clips), values)

    def forward(self, ids: Sequence[torch.Tensor]) -> tuple[list[HeadOutputs], torch.Tensor]:
        """One ``[B, L]`` an encoder (CLIP, CLIP, T5) -> one view a head, and cells ``[B, cells, values]``.

        T5 may be given fewer rows; its view then has as many.
        """
        read: list[torch.Tensor] = []
        states: list[torch.Tensor] = []
        for clip, tokens in zip(self.clips, ids[:2], strict=True):
            out = clip(tokens, output_hidden_states=True)
            states.append(out.hidden_states[-2])
            read += [out.hidden_states[-2].mean(1), out.text_embeds]
        read.append(self.t5(ids[2])[0].mean(1))
        views = [HeadOutputs(head[0](x), head[1](x)) for head, x in zip(self.heads, read, strict=True)]
        return views, self.picture(torch.cat(states, -1)[:, -self.cells :])


class ClipPair(nn.Module):
    """Two CLIPs side by side, as an MMDiT of SD3 reads them."""

    def __init__(self, clips: Sequence[Any]) -> None:
        super().__init__()
        self.clips: Any = nn.ModuleList(clips)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, L]`` -> states ``[B, L, D]`` and pooled ``[B, P]``."""
        outs = [clip(ids, output_hidden_states=True) for clip in self.clips]
        states = torch.cat([out.hidden_states[-2] for out in outs], -1)
        return states, torch.cat([out.text_embeds for out in outs], -1)

    def with_new_layers(self, layers: int) -> ClipPair:
        """A copy of each with so many layers below its own; it says what it said until they learn."""
        return ClipPair([_deepened(clip, layers) for clip in self.clips])

    def lowest(self, layers: int) -> nn.Module:
        """Token embeddings and the lowest layers: the very parameters, in a module of their own."""
        texts = [clip.text_model for clip in self.clips]
        return nn.ModuleList(
            nn.ModuleList([text.embeddings.token_embedding, *text.encoder.layers[:layers]]) for text in texts
        )


def _deepened(clip: Any, layers: int) -> Any:
    """Above the new layers, which add nothing to the residual stream yet, lie those of ``clip``."""
    deep = type(clip)(
        type(clip.config)(
            **{**clip.config.to_dict(), "num_hidden_layers": layers + len(clip.text_model.encoder.layers)}
        )
    )
    state = deep.state_dict()
    for name, value in clip.state_dict().items():
        state[re.sub(r"(?<=encoder\.layers\.)\d+", lambda at: str(int(at[0]) + layers), name)] = value
    deep.load_state_dict(state)
    with torch.no_grad():
        for layer in deep.text_model.encoder.layers[:layers]:
            for last in (layer.self_attn.out_proj, layer.mlp.fc2):
                last.weight.zero_()
                last.bias.zero_()
    return deep


def patchify(latents: torch.Tensor, side: int) -> torch.Tensor:
    """Cut ``[B, C, H, W]`` into ``side`` x ``side`` cells, row by row: ``[B, side^2, C H W / side^2]``."""
    b, c, h, w = latents.shape
    cut = latents.reshape(b, c, side, h // side, side, w // side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(b, side * side, -1)


def unpatchify(cells: torch.Tensor, channels: int) -> torch.Tensor:
    """The inverse of :func:`patchify`, for square pictures: ``[B, N, V]`` -> ``[B, C, H, W]``."""
    b, n, values = cells.shape
    side, edge = round(n**0.5), round((values // channels) ** 0.5)
    laid = cells.reshape(b, side, side, channels, edge, edge).permute(0, 3, 1, 4, 2, 5)
    return laid.reshape(b, channels, side * edge, side * edge)

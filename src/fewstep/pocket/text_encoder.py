"""Pocket's text encoders with the prediction heads of their training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class HeadOutputs:
    """A head's predictions: the sentence embedding ``[B, M]`` and the label logits ``[B, K]``."""

    embedding: torch.Tensor
    label_logits: torch.Tensor


class TextEncodersWithHeads(nn.Module):
    """Two CLIPs and a T5 with linear heads on the outputs that SD3 uses.

    The outputs are the last but one hidden state and the pooled projection of each CLIP, and the last
    state of T5. Hidden states are averaged over the tokens before their head, so that information is
    spread over all tokens that the MMDiT attends to. The last ``cells`` positions of the two CLIPs,
    concatenated, predict the latents of one image cell each.

    Args:
        clips: the two CLIPs.
        t5: the T5 encoder.
        embedding_dim: length of the sentence embeddings.
        num_labels: number of concepts, styles and background colours.
        cells: number of image cells, a square number.
        cell_dim: latent values per cell.
    """

    def __init__(
        self, clips: Sequence[Any], t5: Any, embedding_dim: int, num_labels: int, cells: int, cell_dim: int
    ) -> None:
        super().__init__()
        self.clips = nn.ModuleList(clips)
        self.t5 = t5
        widths = [w for c in clips for w in (c.config.hidden_size, c.config.projection_dim)]
        self.heads: Any = nn.ModuleList(
            nn.ModuleList([nn.Linear(w, embedding_dim), nn.Linear(w, num_labels)])
            for w in (*widths, t5.config.d_model)
        )
        for head in self.heads:
            nn.init.constant_(head[1].bias, -5.0)  # few labels apply to a caption
        self.cells = cells
        self.picture = nn.Linear(sum(c.config.hidden_size for c in clips), cell_dim)

    def forward(self, ids: Sequence[torch.Tensor]) -> tuple[list[HeadOutputs], torch.Tensor]:
        """Return the heads' outputs and the predicted latents, ``[B, cells, cell_dim]``.

        Args:
            ids: Token ids ``[B, L]`` of each encoder (CLIP, CLIP, T5). T5's may have fewer rows; the output
                of its head then has as many.
        """
        features: list[torch.Tensor] = []
        states: list[torch.Tensor] = []
        for clip, tokens in zip(self.clips, ids[:2], strict=True):
            out = clip(tokens, output_hidden_states=True)
            states.append(out.hidden_states[-2])
            features += [out.hidden_states[-2].mean(1), out.text_embeds]
        features.append(self.t5(ids[2])[0].mean(1))
        outputs = [HeadOutputs(head[0](x), head[1](x)) for head, x in zip(self.heads, features, strict=True)]
        return outputs, self.picture(torch.cat(states, -1)[:, -self.cells :])


class ClipPair(nn.Module):
    """Two CLIPs whose outputs are concatenated, as SD3 does."""

    def __init__(self, clips: Sequence[Any]) -> None:
        super().__init__()
        self.clips: Any = nn.ModuleList(clips)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states ``[B, L, D]`` and the pooled states ``[B, P]`` of token ids ``[B, L]``."""
        outs = [clip(ids, output_hidden_states=True) for clip in self.clips]
        states = torch.cat([out.hidden_states[-2] for out in outs], -1)
        return states, torch.cat([out.text_embeds for out in outs], -1)

    def with_new_layers(self, layers: int) -> ClipPair:
        """Return copies with new layers below the others; the outputs are unchanged until these train."""
        return ClipPair([_with_layers_below(clip, layers) for clip in self.clips])

    def lowest_layers(self, layers: int) -> nn.Module:
        """Return a module of the token embeddings and the lowest layers, which shares their parameters."""
        texts = [clip.text_model for clip in self.clips]
        return nn.ModuleList(
            nn.ModuleList([text.embeddings.token_embedding, *text.encoder.layers[:layers]]) for text in texts
        )


def _with_layers_below(clip: Any, layers: int) -> Any:
    """Return a copy of ``clip`` on top of new layers, which add nothing to the residual stream yet."""
    deeper = type(clip)(
        type(clip.config)(
            **{**clip.config.to_dict(), "num_hidden_layers": layers + len(clip.text_model.encoder.layers)}
        )
    )
    state = deeper.state_dict()
    for name, value in clip.state_dict().items():
        state[re.sub(r"(?<=encoder\.layers\.)\d+", lambda match: str(int(match[0]) + layers), name)] = value
    deeper.load_state_dict(state)
    with torch.no_grad():
        for layer in deeper.text_model.encoder.layers[:layers]:
            for output in (layer.self_attn.out_proj, layer.mlp.fc2):
                output.weight.zero_()
                output.bias.zero_()
    return deeper


def patchify(latents: torch.Tensor, side: int) -> torch.Tensor:
    """Cut ``[B, C, H, W]`` into ``side`` x ``side`` cells, row by row: ``[B, side^2, C H W / side^2]``."""
    b, c, h, w = latents.shape
    cells = latents.reshape(b, c, side, h // side, side, w // side)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(b, side * side, -1)


def unpatchify(cells: torch.Tensor, channels: int) -> torch.Tensor:
    """Invert :func:`patchify` for square images: ``[B, N, V]`` -> ``[B, C, H, W]``."""
    b, n, values = cells.shape
    side, edge = round(n**0.5), round((values // channels) ** 0.5)
    image = cells.reshape(b, side, side, channels, edge, edge).permute(0, 3, 1, 4, 2, 5)
    return image.reshape(b, channels, side * edge, side * edge)

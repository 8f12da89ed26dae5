"""Text encoders with the heads through which they learn (floor 2, torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class View:
    """What one reading of a caption says: its meaning ``[B, M]`` and the logits of its truth ``[B, K]``."""

    meaning: torch.Tensor
    truth: torch.Tensor


class Learner(nn.Module):
    """Two CLIPs and a T5 with linear heads on exactly what SD3 reads of them.

    That is the last but one hidden state and the pooled projection of the CLIPs, and the last state of T5.
    Token states are read by their mean, so that meaning is spread over the tokens that the MMDiT attends to.
    """

    def __init__(self, clips: Sequence[Any], t5: Any, meaning: int, truth: int) -> None:
        super().__init__()
        self.clips = nn.ModuleList(clips)
        self.t5 = t5
        widths = [w for c in clips for w in (c.config.hidden_size, c.config.projection_dim)] + [
            t5.config.d_model
        ]
        self.heads: Any = nn.ModuleList(
            nn.ModuleList([nn.Linear(w, meaning), nn.Linear(w, truth)]) for w in widths
        )
        for head in self.heads:
            nn.init.constant_(head[1].bias, -5.0)  # few of all things are in a picture

    def forward(self, ids: Sequence[torch.Tensor]) -> list[View]:
        """One ``[B, L]`` an encoder (CLIP, CLIP, T5) -> one view a head."""
        read: list[torch.Tensor] = []
        for clip, tokens in zip(self.clips, ids[:2], strict=True):
            out = clip(tokens, output_hidden_states=True)
            read += [out.hidden_states[-2].mean(1), out.text_embeds]
        read.append(self.t5(ids[2])[0].mean(1))
        return [View(head[0](x), head[1](x)) for head, x in zip(self.heads, read, strict=True)]

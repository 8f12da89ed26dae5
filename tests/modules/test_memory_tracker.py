"""The ledger of live bytes, and the rules of a GPU that fake tensors follow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fewstep.modules.memory_tracker import (
    ALLOCATED,
    SUMMED,
    WIDENED,
    MemoryTracker,
    fake_tensors,
    simulate_cuda,
)


def test_a_storage_counts_once_until_it_is_let_go() -> None:
    with MemoryTracker() as ledger:
        x = torch.zeros(100)
        views = [x[:10], x.reshape(10, 10).t()]
        assert ledger.live["activations"] == 400
        y = x + 1
        assert ledger.live["activations"] == 800
        ledger.track(x, "frozen")
        assert (ledger.live["frozen"], ledger.live["activations"]) == (400, 400)
        del x, y
        assert sum(ledger.live.values()) == 400  # the views hold it
        del views
        assert sum(ledger.live.values()) == 0
    assert ledger.peaks[""].total == 800


def test_what_autograd_keeps_is_held() -> None:
    with MemoryTracker() as ledger:
        w = torch.ones(50, requires_grad=True)
        y = (w.exp() * 2).sin().sum()  # exp keeps its result, sin its argument
        assert sum(ledger.live.values()) == 200 + 2 * 200 + 4
        y.backward()
        assert sum(ledger.live.values()) == 200 + 200 + 4


def test_sizes_are_rounded_up_as_an_allocator_does() -> None:
    with MemoryTracker(unit=ALLOCATED) as ledger:
        held = torch.zeros(1), torch.zeros(129)
        assert ledger.live["activations"] == 512 + 1024
    del held


def test_fake_tensors_follow_a_gpus_rules_within_the_block_alone() -> None:
    x = torch.zeros(2, 8, dtype=torch.bfloat16)

    def kinds() -> list[torch.dtype]:
        with torch.autocast("cpu", torch.bfloat16):
            return [
                torch.nn.functional.layer_norm(x, (8,)).dtype,
                x.exp().dtype,
                x.sum().dtype,
                (x @ x.t()).dtype,
            ]

    before = kinds()
    with simulate_cuda():
        assert kinds() == [torch.float32] * 3 + [torch.bfloat16]
    assert kinds() == before and torch.bfloat16 in before


def test_the_widened_operations_are_those_of_torchs_table() -> None:
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    text = header.read_text()

    def table(name: str) -> set[str]:
        lines = text[text.index(f"#define {name}") :].split("\n")
        last = next(i for i, line in enumerate(lines) if not line.endswith("\\"))
        return set(re.findall(r"_\(\s*(\w+)", " ".join(lines[: last + 1])))

    assert {name.partition(".")[0] for name in WIDENED} <= table("AT_FORALL_FP32(")
    assert {name.partition(".")[0] for name in SUMMED} <= table("AT_FORALL_FP32_SET_OPT_DTYPE(")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_attention_on_a_gpu_keeps_no_matrix(kind: torch.dtype) -> None:
    length, width = 4096, 64
    with fake_tensors(gpu=True) as ledger:
        q = torch.zeros(1, 2, length, width, dtype=kind, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        assert q.grad is not None and q.grad.shape == q.shape
    assert max(peak.total for peak in ledger.peaks.values()) < 10 * q.numel() * 4 < length * length * 4

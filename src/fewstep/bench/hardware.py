"""Describes this machine, and measures its peak rates of arithmetic and copying.

Run as a script (``python -m fewstep.bench.hardware``) it measures both rates in a process of its own, whose
libraries take their number of threads from the environment.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fewstep.core.types import UserError

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8", "asimd")
"""Instruction sets that are recorded."""

SIDE = 1536
"""Side of the matrices that are multiplied."""

COPIED = 2**26
"""Numbers that are copied: 256 MB, more than any cache."""

REPEATS = 5


@dataclass(frozen=True)
class DevicePeak:
    """Peak rates of a device.

    Attributes:
        operations: float32 multiplications and additions per second in a matrix product, both counted.
        bytes: bytes per second read or written, both counted.
    """

    operations: float
    bytes: float


def describe() -> dict[str, object]:
    """Return a description of this machine for a record."""
    from fewstep.core.cpu import cores

    return {
        "processor": _processor(),
        "instructions": _instructions(),
        "cores": cores(),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": _gpu(),
    }


def _gpu() -> str | None:
    """Return the name of the GPU that its driver reports; ``None`` without one."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return None
    return said.stdout.strip().splitlines()[0] if said.returncode == 0 and said.stdout.strip() else None


def rates(threads: int) -> DevicePeak:
    """Measure this device by numpy's matrix product and by copying, best of :data:`REPEATS`.

    Raises:
        UserError: there is no memory for it.
    """
    environment = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    command = [sys.executable, "-m", "fewstep.bench.hardware"]
    said = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if said.returncode:
        last = (said.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the device's rates could not be measured: {last}")
    return DevicePeak(**json.loads(said.stdout))


def _measured() -> DevicePeak:
    import numpy as np

    rng = np.random.default_rng(0)
    a, b = (rng.random((SIDE, SIDE), np.float32) for _ in range(2))
    whole, copy = np.ones(COPIED, np.float32), np.empty(COPIED, np.float32)
    product = min(_seconds(lambda: a @ b) for _ in range(REPEATS + 1))
    moved = min(_seconds(lambda: np.copyto(copy, whole)) for _ in range(REPEATS + 1))
    return DevicePeak(2 * SIDE**3 / product, 2 * whole.nbytes / moved)


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _cpuinfo(name: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _instructions() -> list[str]:
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [name for name in INSTRUCTIONS if name in flags]


def _memory() -> int | None:
    """Return the bytes of memory; ``None`` if the system does not report them."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(json.dumps(vars(_measured())))

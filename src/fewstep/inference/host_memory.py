"""CPU memory of this process."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path


def rss() -> int:
    """Return the resident memory of this process in bytes; without procfs the peak of it."""
    trim()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):  # no procfs
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * mmap.PAGESIZE


def trim() -> None:
    """Return freed memory of the C library to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only in glibc
    if trim is not None:
        trim(0)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def set_malloc_thresholds() -> None:
    """Make the C library return freed memory of 128 KiB and more, a limit that glibc raises by default."""
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(M_MMAP_THRESHOLD, 2**17)
        option(M_TRIM_THRESHOLD, 2**17)

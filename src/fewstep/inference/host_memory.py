"""Memory of this process."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path


def rss() -> int:
    """Bytes of this process that are in memory now."""
    trim()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):  # no Linux: the most there ever was
        import resource
        import sys

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return pages * mmap.PAGESIZE


def trim() -> None:
    """Give back what the C library keeps of freed memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def set_malloc_thresholds() -> None:
    """From here on the C library gives freed tensors of 128 KiB back, where it else learns to keep ever
    larger ones for later."""
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(M_MMAP_THRESHOLD, 2**17)
        option(M_TRIM_THRESHOLD, 2**17)

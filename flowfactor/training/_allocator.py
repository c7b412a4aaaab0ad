"""What the C library does with the memory of tensors that are gone."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h), and the largest threshold that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP, _KEPT = 32 * 1024**2, 1024**3


def keep_freed_memory() -> bool:
    """Has this process keep up to 1 GiB of freed memory for the next tensors, instead of handing it back at once.

    By default glibc maps fresh pages for every large tensor and unmaps them when it is gone; the kernel has to clear
    them each time, which takes a fifth of a training step on frames of 64 x 64. It concerns the whole process, so that
    only programs call it, no part of the library.

    Returns:
        Whether the C library took the settings; other libraries than glibc have none.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))

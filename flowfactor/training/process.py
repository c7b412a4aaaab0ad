"""What a program asks of its process before it trains: settings of the whole process, which no library touches."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h), and the largest threshold that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP, _KEPT = 32 * 1024**2, 1024**3


def prepare_process() -> None:
    """Keeps freed memory, and has processors take numbers below the normal range (1.2e-38 in float32) as zero.

    Weights that never get a gradient, such as those that look at a dark corner, have a running mean of it that decays to
    such numbers, on which processors are ten times as slow: after some 800 steps the optimizer would be. Threads inherit
    this from the one that starts them, so that it has to come before any work.

    flowfactor's programs call it and its library never does: it is for the first line of a program of your own that trains
    on processors.

    Example:
        >>> import flowfactor as ff
        >>> ff.training.prepare_process()
    """
    import torch  # here, so that what knows of this function alone stays light

    keep_freed_memory()
    torch.set_flush_denormal(True)


def keep_freed_memory() -> bool:
    """Has this process keep up to 1 GiB of freed memory for the next tensors, instead of handing it back at once.

    By default glibc maps fresh pages for every large tensor and unmaps them when it is gone; the kernel has to clear
    them each time, which takes a fifth of a training step on frames of 64 x 64.

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

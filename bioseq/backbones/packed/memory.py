"""Keeps freed activations in the process, so that the next batch does not fault every page in again."""

from __future__ import annotations

import ctypes
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library


@cache
def keep_heap() -> bool:
    """Tell the allocator to reuse large blocks instead of giving them back to the kernel at once.

    Activations of a batch are megabytes each; by default the GNU C library maps and unmaps every one, and the
    page faults cost an encoder 10 to 15 % on a CPU. Process-wide, at most 1 GiB a block. False, and nothing
    done, where the C library has no `mallopt`.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30) and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))

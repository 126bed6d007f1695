"""How this process treats its memory: large uploads, and what it is made of."""

import ctypes
import gc
from contextlib import suppress

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BLOCK_BYTES = 1024 * 1024
# New objects that are looked through at once, how many times these once more, and how often those until all are: every
# million objects or so.
LOOKED_THROUGH = (1_000, 5, 200)


def return_large_blocks() -> None:
    """Have glibc give large blocks back when they are freed, instead of keeping them in the heap of each thread.

    Measured: 30 uploads of 9 MB at once leave 10 MB behind instead of 240. Other C libraries are left as they are.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def keep_what_is_loaded() -> None:
    """Leave everything that is there now out of every collection of garbage to come, and make those short.

    Measured: looking through the program and its libraries would stop all requests for 0.1 s each time, looking through
    20,000 new objects while 200 streams are open for 28 ms.
    """
    gc.freeze()
    gc.set_threshold(*LOOKED_THROUGH)

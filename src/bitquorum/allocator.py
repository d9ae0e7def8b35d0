"""Keep freed memory in the process: what a training step frees the next one takes again, page by page.

The C library gives large blocks back to the system when they are freed, which then clears every page anew for the next
step. Imports nothing, so that the command line starts fast.
"""

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of glibc's mallopt
_PAD = 256 << 20  # bytes that the heap grows by


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory for this process; return whether it will.

    The resident memory then stays at its peak until the process ends. Only glibc knows how; elsewhere, and where an
    environment variable `MALLOC_..._` or `GLIBC_TUNABLES` already says what to do, nothing changes.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # No block by mmap, which would go back when freed; and no trimming of the heap, which holds them all instead.
    return all(mallopt(name, value) for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _PAD)))

"""The C library's allocator, told to keep what is freed.

XLA takes the buffers of every step on CPU from it and gives them back. glibc hands the larger ones
back to the kernel, which has to zero their pages anew: much of the step of a small model.
"""

import ctypes

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_MMAP_MOST = 1 << 25  # the largest that it accepts
_PAD = 1 << 26
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> bool:
  """Keeps freed memory within the process; returns whether the C library can (glibc can)."""
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:
    return False
  wanted = ((_MMAP_THRESHOLD, _MMAP_MOST), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _PAD))
  return all(mallopt(name, value) == 1 for name, value in wanted)

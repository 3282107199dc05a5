"""Freed memory stays: a buffer that comes again costs no new pages."""

import resource
import subprocess
import sys

import pytest

_FAULTS = """
import ctypes, resource, sys
from experiments import allocator
if sys.argv[1] == "keep" and not allocator.keep_freed_memory():
  sys.exit("no mallopt")
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
  blocks = [libc.malloc(20 << 20) for _ in range(5)]
  for block in blocks:
    ctypes.memset(block, 1, 20 << 20)
  for block in blocks:
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(mode):
  done = subprocess.run([sys.executable, "-c", _FAULTS, mode], capture_output=True, text=True)
  if "no mallopt" in done.stderr:
    pytest.skip("this C library has no mallopt")
  assert done.returncode == 0, done.stderr
  return int(done.stdout)


def test_memory_that_is_taken_again_has_no_new_pages():
  pages = 5 * (20 << 20) // resource.getpagesize()
  assert _faults("keep") < 2 * pages < 10 * pages < _faults("leave")

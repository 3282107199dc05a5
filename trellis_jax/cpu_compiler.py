"""Keeps XLA's CPU compiler from fusions that it gets wrong.

Since jaxlib 0.10.2 it hands sums, with what is around them, to YNNPACK, and some of these programs
read memory that nothing has written: the op's outputs for 64 rows of one chunk were garbage when
its last state was not asked for, with jaxlib 0.10.2 as with 0.12.0.1 (jax-ml/jax issues 39103 and
40412 are of the same kind). The flag leaves sums to XLA, products stay with YNNPACK; a
decoder's single tokens are slower for it (benchmarks/decode_cost.py with the flag as it comes).

XLA reads its flags once, before a process's first computation: a program that computes something
before it imports this library has to set the flag itself.
"""

import importlib.util
import os
from collections.abc import Mapping

import jaxlib

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# XLA stops at a flag that it does not know: only versions that have it, those of setup.py.
FIRST, BEYOND = (0, 10), (0, 13)


def flags(environ: Mapping[str, str], version: str, libtpu: bool) -> str:
  """Returns what XLA_FLAGS should be.

  It is left as it is where it says something about YNNPACK already, where jaxlib is not of the
  versions that have the flag, and where libtpu is: that reads XLA_FLAGS too, by its own version.

  Args:
    environ: the environment.
    version: of jaxlib, "0.10.2".
    libtpu: whether it is installed; with JAX_PLATFORMS=cpu it is not loaded.
  """
  given = environ.get("XLA_FLAGS", "")
  loaded = libtpu and environ.get("JAX_PLATFORMS") != "cpu"
  release = tuple(int(part) for part in version.split(".")[:2])
  if FLAG in given or loaded or "TPU_LIBRARY_PATH" in environ or not FIRST <= release < BEYOND:
    return given
  return f"{given} {FLAG}=-reduce".lstrip()


def leave_sums_to_xla() -> None:
  """Sets XLA_FLAGS for computations from now on; to be called before the first one."""
  libtpu = importlib.util.find_spec("libtpu") is not None
  given = flags(os.environ, jaxlib.__version__, libtpu)
  if given:
    os.environ["XLA_FLAGS"] = given

"""Set-up of all tests: CPU, quick compiles, compiled programs kept between runs."""

import gc
import importlib.metadata
import os
import pathlib

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests run many small programs once: compiling them takes far longer than running them.
_quick = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
  # The emitter that compiles in two thirds of the time; later ones do not know the flag, and stop.
  _quick += " --xla_cpu_use_fusion_emitters=false"
if os.environ["JAX_PLATFORMS"] == "cpu":
  os.environ.setdefault("XLA_FLAGS", _quick)
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Linux gives a process 65,530 memory mappings by default, and every compiled program holds some.
MAPPINGS, MOST_MAPPINGS = pathlib.Path("/proc/self/maps"), 25_000


@pytest.fixture(autouse=True)
def _few_compiled_programs():
  """Lets go of compiled programs before a process runs out of memory mappings."""
  yield
  if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
    import jax  # not at the top: it reads the environment above when it is imported

    jax.clear_caches()
    gc.collect()

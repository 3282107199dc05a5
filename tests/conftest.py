"""Set-up of all tests: CPU, quick compiles, compiled programs kept between runs."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests run many small programs once: compiling them takes far longer than running them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

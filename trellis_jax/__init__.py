"""Trellis in JAX: attention whose key-value cache is a memory of fixed size (COLM 2025)."""

# Before anything computes.
from trellis_jax import cpu_compiler

cpu_compiler.leave_sums_to_xla()

# ruff: noqa: E402
from trellis_jax import inspect, mixers, sharding
from trellis_jax.attention import TrellisAttention
from trellis_jax.forecaster import Forecaster, ForecasterConfig
from trellis_jax.generate import generate
from trellis_jax.model import LM, LMConfig
from trellis_jax.ops.state import TrellisState
from trellis_jax.ops.trellis import trellis
from trellis_jax.version import __version__

__all__ = [
  "LM",
  "Forecaster",
  "ForecasterConfig",
  "LMConfig",
  "TrellisAttention",
  "TrellisState",
  "__version__",
  "generate",
  "inspect",
  "mixers",
  "sharding",
  "trellis",
]

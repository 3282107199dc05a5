"""What the op accepts; every refusal is one sentence, before anything is compiled."""

import jax
import jax.numpy as jnp
import numpy as np

from trellis_jax.ops.spec import Spec
from trellis_jax.ops.state import TrellisState


def check(
  spec: Spec, q, k, v, alpha, log_beta, gamma, initial_memory, initial_state, segment_ids
) -> None:
  """Raises ValueError unless shapes, dtypes and concrete gates are what `trellis` states."""
  arrays = {"q": q, "k": k, "v": v, "alpha": alpha, "log_beta": log_beta, "gamma": gamma}
  for name, x in arrays.items():
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} has dtype {x.dtype}; accepted are floating dtypes")
  if q.ndim != 4:
    raise ValueError(f"q has shape {q.shape}; accepted is [B, T, H, D]")
  b, t, h, d = q.shape
  for name, letter in (("v", "V"), ("alpha", "M")):
    if arrays[name].ndim != 4:
      raise ValueError(f"{name} has shape {arrays[name].shape}; accepted is [B, T, H, {letter}]")
  m, width = alpha.shape[-1], v.shape[-1]
  for name, x in arrays.items():
    last = {"q": (d,), "k": (d,), "v": (width,), "alpha": (m,)}.get(name, ())
    if x.shape != (b, t, h, *last):
      raise ValueError(
        f"{name} has shape {x.shape}; with q {q.shape} it must be {(b, t, h, *last)}"
      )
  if 0 in (b, t, h, d, m, width):
    raise ValueError(f"B, T, H, D, V, M are {(b, t, h, d, width, m)}; each must be >= 1")
  _check_segments(segment_ids, b, t)
  if initial_memory is not None:
    _check_memory("initial_memory", initial_memory, ((h, m, d), (h, m, width)))
  if initial_state is not None:
    _check_state(spec, initial_state, ((b, h, m, d), (b, h, m, width)))
  _check_gates(log_beta, gamma)


def _check_segments(segment_ids, b, t):
  if segment_ids is None:
    return
  if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
    raise ValueError(f"segment_ids has dtype {segment_ids.dtype}; accepted are integer dtypes")
  if segment_ids.shape != (b, t):
    raise ValueError(f"segment_ids has shape {segment_ids.shape}; it must be {(b, t)}")


def _check_memory(name, memory, shapes):
  if not isinstance(memory, tuple | list) or len(memory) != 2:
    raise ValueError(f"{name} is a {type(memory).__name__}; accepted is a pair (S_k, S_v)")
  for part, x, shape in zip(("S_k", "S_v"), memory, shapes):
    if x.shape != shape:
      raise ValueError(f"{part} of {name} has shape {x.shape}; it must be {shape}")


def _check_state(spec, state, shapes):
  if not isinstance(state, TrellisState):
    raise ValueError(f"initial_state is a {type(state).__name__}; accepted is a TrellisState")
  _check_memory("initial_state", (state.memory_k, state.memory_v), shapes)
  has_anchors = state.anchor_k is not None
  if has_anchors != (spec.chunk_size > 1):
    made = "chunk_size > 1" if has_anchors else "chunk_size = 1"
    raise ValueError(
      f"chunk_size={spec.chunk_size} cannot go on from a state made with {made}; "
      "use one chunk_size for the whole sequence"
    )


def _check_gates(log_beta, gamma):
  """Looks at values only where they are there to look at, outside of a trace."""
  if not isinstance(log_beta, jax.core.Tracer):
    values = np.asarray(log_beta, dtype=np.float64)
    if not np.all(values <= 0):
      bad = values[~(values <= 0)].flat[0]
      raise ValueError(f"log_beta has the value {bad}; accepted are log decays <= 0, -inf included")
  if not isinstance(gamma, jax.core.Tracer):
    values = np.asarray(gamma, dtype=np.float64)
    if not np.all(np.isfinite(values)):
      bad = values[~np.isfinite(values)].flat[0]
      raise ValueError(f"gamma has the value {bad}; accepted are finite steps")

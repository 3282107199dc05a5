"""What the kernels of every backend accept, and what they take of a state for a single token."""

import dataclasses

import jax
import jax.numpy as jnp

WIDTHS, SLOTS, CHUNKS = (64, 128), (32, 64, 128), (16, 32, 64)
ACTIVATIONS = ("identity", "silu", "ln_silu", "l2_silu")
DTYPES = ("bfloat16", "float32")
# Columns of a token's flags.
LIVE, RESTARTS, OPENS, CLOSES = range(4)


def _platform() -> str:
  """Returns where a call would run: the mesh's device if it names one, else JAX's default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def reasons(spec, shapes, platforms: tuple[str, ...] | None) -> str | None:
  """Returns None, or every reason why a backend's kernels cannot run a call here.

  Args:
    spec, shapes: as `trellis_jax.ops.backends` has them.
    platforms: where the backend runs; None for an interpreter, which runs anywhere.
  """
  checks = [] if platforms is None else [("platform", _platform(), platforms)]
  checks += [("D", shapes.D, WIDTHS), ("V", shapes.V, WIDTHS), ("M", shapes.M, SLOTS)]
  checks += [("chunk_size", spec.chunk_size, CHUNKS), ("dtype", shapes.dtype, DTYPES)]
  checks += [(role, getattr(spec, role), ACTIVATIONS) for role in ("phi", "f", "phi_out")]
  found = [
    f"{name} is {given}, not one of {', '.join(map(str, accepted))}"
    for name, given, accepted in checks
    if given not in accepted
  ]
  return "; ".join(found) or None


def one_token(launch, spec, memory, state, token):
  """Returns (state after one token, o [B H V] in fp32), as `trellis_jax/ops/reference.py` says.

  Args:
    launch: takes flags int32 [B 4] (whether the token exists, restarts its row, opens a chunk,
      closes one), gates fp32 [B H 2] (exp(log_beta), gamma), q, k, v, alpha [B H D | V | M], and
      pairs of fp32 memories: S and A [B H M D | V], the initial ones [H M D | V]; returns
      (o, (S_k, S_v), (A_k, A_v)).
    spec, memory, state, token: as the definition's.
  """
  *tokens, log_beta, gamma, segment = token
  live = segment != 0
  restarts = live & (state.segment != 0) & (segment != state.segment)
  offset = jnp.where(live, (state.offset + 1) % spec.chunk_size, state.offset)
  o, memories, anchors = launch(
    jnp.stack([live, restarts, state.offset == 0, offset == 0], axis=1).astype(jnp.int32),
    jnp.stack([jnp.exp(log_beta), gamma], axis=-1),
    *tokens,
    (state.memory_k, state.memory_v),
    (state.anchor_k, state.anchor_v),
    memory,
  )
  names = ("memory_k", "memory_v", "anchor_k", "anchor_v")
  new = dict(zip(names, (*memories, *anchors)), offset=offset)
  return dataclasses.replace(state, **new, segment=jnp.where(live, segment, state.segment)), o

"""A single token: what a backend's kernel for it is given of a state, and the state after it."""

import dataclasses

import jax.numpy as jnp

# Columns of a token's flags.
LIVE, RESTARTS, OPENS, CLOSES = range(4)


def step(launch, spec, memory, state, token):
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

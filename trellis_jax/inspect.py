r"""What happens inside the memories: gates, inner losses around each write, norms, ranks.

The trace runs the mixer's tokens through the definition of the op, one at a time, beside the
model's own forward; training never pays for it. Per token and head, for w = k with S_k and w = v
with S_v, and S- and S+ the memory before and after the token's write:

  loss_before = |phi(S- w) - a|^2 / 2,    loss_after = |phi(S+ w) - a|^2 / 2    (paper, eq. 4)

The write is what the token adds, S+ - b S-, which is -g u w^T with u at the start of the chunk. The
effective rank of a matrix is exp(-sum p log p), p its singular values divided by their sum.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from trellis_jax.mixers import trellis as trellis_mixer
from trellis_jax.ops import activations, reference
from trellis_jax.ops.grid import Grid
from trellis_jax.ops.spec import Spec
from trellis_jax.typing import Array, Hidden, SegmentIds, Tokens

Trace = dict[str, Array]


def trace_lm(
  lm: Any, tokens: Tokens, *, segment_ids: SegmentIds | None = None, every: int = 64
) -> list[Trace]:
  """Returns the trace of each layer, in order; {} for layers of another mixer.

  Args:
    lm: a `trellis_jax.LM`.
    tokens: [B, T].
    segment_ids: [B, T] documents, 0 is padding.
    every: tokens between two snapshots of the memories; divides T.
  """

  graph, params = nnx.split(lm)
  repeated, rest = _trace_layers(graph, every, params, tokens, segment_ids)
  traces = []
  for i in range(lm.cfg.num_layers // len(lm.cfg.pattern)):
    traces += [jax.tree.map(lambda x: x[i], trace) for trace in repeated]
  return [*traces, *rest]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _trace_layers(graph, every, params, tokens, segment_ids):
  """Returns the traces of the repeated layers, stacked, and of the rest."""
  lm = nnx.merge(graph, params)

  def run(block, x, _):
    trace = {}
    if isinstance(block.mixer, trellis_mixer.Mixer):
      trace = trace_mixer(block.mixer, block.mixer_norm(x), segment_ids=segment_ids, every=every)
    return block(x, segment_ids=segment_ids)[0], trace

  return lm.over_layers(run, lm.embed(tokens))[1]


def trace_mixer(
  mixer: trellis_mixer.Mixer,
  x: Hidden,
  *,
  state: trellis_mixer.State | None = None,
  segment_ids: SegmentIds | None = None,
  every: int = 64,
) -> Trace:
  """Returns what the mixer does on rows x, fresh or going on from a state.

  Per token [B, T, H]: forget_gate, step_size, target_norm, loss_before_k, loss_after_k, write_k
  (the write's l2 norm), and the latter three of v. What the op is given, [B, T, H, W]: query, key,
  value, target. Per snapshot [B, T / every, H]: norm_k, norm_v, rank_k, rank_v. The snapshots
  themselves: memory_k [B, T / every, H, M, D], memory_v [.., M, V]. Padding does not exist: its
  tokens' values are 0, and snapshots count live tokens.

  Raises:
    ValueError: `every` does not divide T.
  """
  length = x.shape[1]
  if every < 1 or length % every:
    raise ValueError(f"every={every} is not accepted; it must divide the {length} tokens")
  spec = Spec(**mixer.op_knobs()).check()
  start = (state or mixer.init_state(x.shape[0])).memory
  memory = mixer.initial_memory() or (
    jnp.zeros_like(start.memory_k[0]),
    jnp.zeros_like(start.memory_v[0]),
  )
  ids = jnp.broadcast_to(jnp.maximum(start.segment, 1)[:, None], x.shape[:2])
  if segment_ids is not None:
    grid = Grid.of(segment_ids != 0, jnp.zeros((x.shape[0],), jnp.int32), length)
    x, ids = grid.spread(x), grid.spread(segment_ids)
  arrays, _ = mixer.op_inputs(x, state, None if segment_ids is None else ids)
  wide = jax.tree.map(lambda y: y.astype(start.memory_k.dtype), arrays)

  def token(state, xs):
    before = _entered(memory, state, xs[-1])
    state, _ = reference.step(spec, memory, state, xs)
    after = (state.memory_k, state.memory_v)
    return state, (
      *_losses(spec, before, xs),
      *_losses(spec, after, xs),
      *_writes(before, after, xs),
    )

  def stretch(state, xs):
    state, tokens = jax.lax.scan(token, state, xs)
    return state, (tokens, state.memory_k, state.memory_v)

  time_major = tuple(
    jnp.moveaxis(y, 1, 0).reshape(-1, every, y.shape[0], *y.shape[2:]) for y in (*wide, ids)
  )
  _, (values, memory_k, memory_v) = jax.lax.scan(stretch, start, time_major)
  names = [f"{what}_{s}" for what in ("loss_before", "loss_after", "write") for s in "kv"]
  rows_first = lambda y: jnp.moveaxis(y.reshape(-1, *y.shape[2:]), 0, 1)
  trace = {name: rows_first(value) for name, value in zip(names, values)}
  q, k, v, alpha, log_beta, gamma = wide
  trace |= {
    "forget_gate": jnp.exp(log_beta),
    "step_size": gamma,
    "target_norm": jnp.linalg.norm(alpha, axis=-1),
    **dict(query=q, key=k, value=v, target=alpha),
  }
  if segment_ids is not None:
    trace = jax.tree.map(grid.collect, trace)
  for name, s in (("k", memory_k), ("v", memory_v)):
    s = trace[f"memory_{name}"] = jnp.moveaxis(s, 0, 1)
    trace[f"norm_{name}"] = jnp.sqrt(jnp.sum(s * s, axis=(-2, -1)))
    trace[f"rank_{name}"] = effective_rank(s)
  return trace


def effective_rank(s: Float[Array, "... M W"]) -> Float[Array, "..."]:
  """Returns the effective rank of each matrix, in [1, min(M, W)]; 1 for a zero matrix."""
  values = jnp.linalg.svd(s, compute_uv=False)
  total = jnp.sum(values, axis=-1, keepdims=True)
  p = values / jnp.where(total > 0, total, 1)
  return jnp.exp(-jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), axis=-1))


def _entered(memory, state, segment):
  """Returns the memories (S_k, S_v) that a token's write starts from, at a restart the initial."""
  restart = (segment != 0) & (state.segment != 0) & (segment != state.segment)
  enter = lambda first, running: jnp.where(restart[:, None, None, None], first[None], running)
  return enter(memory[0], state.memory_k), enter(memory[1], state.memory_v)


def _losses(spec, memories, xs):
  """Returns the compression losses (key, value) [B, H] of a token at the memories (S_k, S_v)."""
  _, k, v, alpha, *_ = xs

  def loss(s, w):
    z = jnp.einsum("bhmw,bhw->bhm", s, w, precision=spec.precision)
    error = activations.apply(spec.phi, z, spec.phi_eps) - alpha
    return 0.5 * jnp.sum(error * error, axis=-1)

  return loss(memories[0], k), loss(memories[1], v)


def _writes(before, after, xs):
  """Returns the norms [B, H] of what a token added to S_k and S_v."""
  *_, log_beta, _, _ = xs
  kept = jnp.exp(log_beta)[..., None, None]
  return tuple(jnp.linalg.norm(y - kept * x, axis=(-2, -1)) for x, y in zip(before, after))

"""What Trellis's memories do while a model learns: means over a batch's tokens, of each layer.

  forget_gate, step_size   b and g
  overshoot                C g |k|^2, the step of a chunk of like keys
  write_k, write_v         norms of the writes
  loss_k, loss_v           compression losses before the writes; gain_k, gain_v: what these took off
  norm_k, norm_v           norms of the memories after the last token; rank_k, rank_v: their ranks
  rank_key, rank_target    ranks of a row's keys, of its target codes
  binding                  MQAR alone: share of queries for which, of the tokens behind the pairs'
                           keys, the one behind its own key has been written with the nearest key

Ranks are effective ones, see `trellis_jax.inspect`.
"""

from typing import Any

import jax.numpy as jnp
import ml_collections
from jaxtyping import Float

from trellis_jax import inspect, mixers
from trellis_jax.typing import Array


def measure(
  lm: Any, batch: dict[str, Array], data: ml_collections.ConfigDict
) -> dict[str, Float[Array, " L"]]:
  """Returns the means over a batch of L layers of Trellis, {} for none.

  Args:
    lm: a `trellis_jax.LM`.
    batch: tokens, segment_ids and weights [B, T] of rows without padding.
    data: the run's `config.data`.
  """
  length = batch["tokens"].shape[1]
  layers = inspect.trace_lm(lm, batch["tokens"], segment_ids=batch["segment_ids"], every=length)
  chunk = mixers.configure("trellis", lm.cfg.mixers.get("trellis")).chunk_size
  found = []
  for trace in filter(None, layers):
    found.append(_means(trace, chunk))
    if data.task == "mqar":
      found[-1]["binding"] = binding(trace, batch, data.mqar.blanks, data.mqar.pairs)
  return {name: jnp.stack([means[name] for means in found]) for name in (found or [{}])[0]}


def _means(trace: inspect.Trace, chunk: int) -> dict[str, Float[Array, ""]]:
  means = {name: jnp.mean(trace[name]) for name in ("forget_gate", "step_size")}
  keys = jnp.sum(jnp.square(trace["key"]), axis=-1)
  means["overshoot"] = jnp.mean(chunk * trace["step_size"] * keys)
  for s in "kv":
    means |= {f"{name}_{s}": jnp.mean(trace[f"{name}_{s}"]) for name in ("write", "norm", "rank")}
    means[f"loss_{s}"] = jnp.mean(trace[f"loss_before_{s}"])
    means[f"gain_{s}"] = means[f"loss_{s}"] - jnp.mean(trace[f"loss_after_{s}"])
  for name in ("key", "target"):
    by_head = jnp.moveaxis(trace[name], 1, 2)
    means[f"rank_{name}"] = jnp.mean(inspect.effective_rank(by_head))
  return means


def binding(
  trace: inspect.Trace, batch: dict[str, Array], blanks: int, pairs: int
) -> Float[Array, ""]:
  """Returns the share of MQAR's queries (and heads) that point at their own pair's value.

  Args:
    trace: of a layer.
    batch: tokens and weights [B, T] of `tasks/mqar.py`.
    blanks, pairs: of the task.
  """
  end = blanks + 2 * pairs
  keys, written = batch["tokens"][:, blanks:end:2], trace["key"][:, blanks + 1 : end : 2]
  near = jnp.einsum("bthd,bphd->btph", trace["query"], written)
  own = (batch["tokens"][:, :, None] == keys[:, None]).argmax(-1)
  right = jnp.mean(near.argmax(2) == own[..., None], axis=-1)
  return jnp.sum(batch["weights"] * right) / jnp.sum(batch["weights"])

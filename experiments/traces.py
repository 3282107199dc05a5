"""What Trellis's memories do while a model learns: means over a batch's tokens, of each layer.

  forget_gate, step_size   b and g
  overshoot                C g |k|^2, the step of a stale chunk of like keys; g |k|^2 without them
  write_k, write_v         norms of the writes
  loss_k, loss_v           compression losses before the writes; gain_k, gain_v: what these took off
  norm_k, norm_v           norms of the memories after the last token; rank_k, rank_v: their ranks
  rank_key, rank_target    ranks of a row's keys, of its target codes
  binding                  MQAR alone: share of queries for which, of the tokens behind the pairs'
                           keys, the one behind its own key has been written with the nearest key
  higher_order             of the parameters' gradient, what goes through the memory that the inner
                           gradient is taken at, as a share of the norm; the model's, at each layer

Ranks are effective ones, see `trellis_jax.inspect`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx
from jaxtyping import Float

from experiments import step
from trellis_jax import LM, inspect, mixers
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
  knobs = mixers.configure("trellis", lm.cfg.mixers.get("trellis"))
  chunk = 1 if knobs.curvature else knobs.chunk_size
  found = []
  for trace in filter(None, layers):
    found.append(_means(trace, chunk))
    if data.task == "mqar":
      found[-1]["binding"] = binding(trace, batch, data.mqar.blanks, data.mqar.pairs)
  share = higher_order(lm, batch) if found else None
  found = [means | {"higher_order": share} for means in found]
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


def higher_order(lm: LM, batch: dict[str, Array]) -> Float[Array, ""]:
  """Returns |G - G_1| / |G| for the loss's gradient G by all parameters of a model with Trellis.

  G is whole (`outer_gradient` 1) and G_1 of first order (0), whatever the model trains with.

  Args:
    lm, batch: as in `measure`, with targets [B, T].
  """
  _, params = nnx.split(lm, nnx.Param)

  def gradient(rho: float):
    knobs = {**lm.cfg.mixers.get("trellis", {}), "outer_gradient": rho}
    cfg = dataclasses.replace(lm.cfg, mixers={**lm.cfg.mixers, "trellis": knobs})
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: LM(cfg, rngs=nnx.Rngs(0))), nnx.Param)
    sums = step.loss_fn(graphdef, z_loss=0.0, batch_shards=1)
    return step.gradients(sums, nnx.to_pure_dict(params), batch, 1)[0]

  whole, first = gradient(1.0), gradient(0.0)
  return optax.tree.norm(jax.tree.map(jnp.subtract, whole, first)) / optax.tree.norm(whole)

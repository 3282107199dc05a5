"""One update and one evaluation, as pure functions of arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments import loss

# tokens, targets, weights and, where a row may hold more than one document, segment_ids: [B, T]
Batch = dict[str, Array]
Params = Any  # nested dict of fp32 arrays
LossFn = Callable[[Params, Batch], loss.LossSums]


class State(NamedTuple):
  """What training changes."""

  step: Int[Array, ""]  # updates made
  params: Params
  opt_state: optax.OptState


def init_state(make_lm: Callable[[], nnx.Module], optimizer: optax.GradientTransformation) -> State:
  """The state before the first update; to be jitted, with the shardings of its result."""
  params = nnx.to_pure_dict(nnx.split(make_lm(), nnx.Param)[1])
  return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def loss_fn(graphdef: nnx.GraphDef, *, z_loss: float, batch_shards: int) -> LossFn:
  """The sums of a language model's loss over a batch, as a function of its parameters."""

  def sums(params: Params, batch: Batch) -> loss.LossSums:
    lm = nnx.merge(graphdef, params)
    hidden, _ = lm.hidden(batch["tokens"], segment_ids=batch.get("segment_ids"))
    targets, weights = batch["targets"], batch["weights"]
    return loss.cross_entropy(
      hidden, lm.head_kernel(), targets, weights, z_loss=z_loss, batch_shards=batch_shards
    )

  return sums


def sum_over_microbatches(fn: Callable[[Batch], Any], batch: Batch, grad_accum: int) -> Any:
  """fn(batch), added up over `grad_accum` microbatches, so that one of them is in memory at a time.

  Microbatch j holds rows j, j + grad_accum, ...: every device keeps the rows that it has.
  """
  if grad_accum == 1:
    return fn(batch)
  split = lambda x: jnp.moveaxis(x.reshape(-1, grad_accum, *x.shape[1:]), 1, 0)
  micros = jax.tree.map(split, batch)
  result = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], micros))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)
  add = lambda total, micro: (jax.tree.map(jnp.add, total, fn(micro)), None)
  return jax.lax.scan(add, zeros, micros)[0]


def gradients(
  sums_fn: LossFn, params: Params, batch: Batch, grad_accum: int, constrain=lambda grads: grads
) -> tuple[Params, loss.LossSums]:
  """Gradients of the objective's mean per token over the whole batch, and the batch's sums.

  Microbatches add sums, and the division by the whole batch's count comes once, at the end: so they
  give the large batch's gradients also when they count different numbers of tokens.

  Args:
    constrain: applied to each microbatch's gradients, to say where they live.
  """

  def micro(batch: Batch):
    def objective(params: Params):
      sums = sums_fn(params, batch)
      return sums.objective, sums

    grads, sums = jax.grad(objective, has_aux=True)(params)
    return constrain(grads), sums

  grads, sums = sum_over_microbatches(micro, batch, grad_accum)
  return jax.tree.map(lambda g: g / per_token(sums), grads), sums


def per_token(sums: loss.LossSums) -> Float[Array, ""]:
  """What a batch's sums are divided by; a batch without a counted token has loss 0."""
  return jnp.where(sums.count > 0, sums.count, 1.0)


def train_step(
  state: State,
  batch: Batch,
  *,
  sums_fn: LossFn,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  grad_accum: int = 1,
  constrain=lambda grads: grads,
) -> tuple[State, dict[str, Float[Array, ""]]]:
  """One update, and its metrics: loss and accuracy before it, norms, tokens, learning rate.

  `grad_norm` is taken before clipping, `param_norm` after the update: where all are finite, so is
  the new state.
  """
  grads, sums = gradients(sums_fn, state.params, batch, grad_accum, constrain)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {
    "loss": sums.nll / per_token(sums),  # nats
    "accuracy": sums.correct / per_token(sums),
    "tokens": sums.count,
    "learning_rate": schedule(state.step),
    "grad_norm": optax.tree.norm(grads),
    "update_norm": optax.tree.norm(updates),
    "param_norm": optax.tree.norm(params),
  }
  return State(state.step + 1, params, opt_state), metrics


def eval_step(
  params: Params,
  batch: Batch,
  token_bytes: Int[Array, " vocab"],
  *,
  sums_fn: LossFn,
  grad_accum: int = 1,
) -> dict[str, Float[Array, ""]]:
  """Sums of a batch for the held-out metrics: nll in nats, correct and counted tokens, bytes."""

  def micro(batch: Batch):
    sums = sums_fn(params, batch)
    size = jnp.sum(batch["weights"] * token_bytes[batch["targets"]])
    return {"nll": sums.nll, "correct": sums.correct, "count": sums.count, "bytes": size}

  return sum_over_microbatches(micro, batch, grad_accum)

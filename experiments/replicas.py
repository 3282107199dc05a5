"""Trains replicas of one run side by side: every seed with every learning rate, in one program.

Small models leave an accelerator idle, so a study's replicas share each step; on a CPU they take
their turns in it. A replica computes what a run of experiments/train.py with its seed and peak
learning rate computes.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from experiments import config, data, optim, traces
from experiments import step as step_lib
from experiments.errors import UserError
from trellis_jax import LM

ONSET = 0.5  # accuracy of a batch of unseen examples


@dataclasses.dataclass
class Replica:
  """What is known of one replica; lists have an entry per logged step or per evaluation.

  Attributes:
    seed, peak_lr: what tells it from the others.
    steps: logged steps; train_loss, train_accuracy, grad_norm: at those steps.
    eval_steps: evaluated steps; eval_loss, eval_accuracy: on held-out rows, at those steps.
    traces: of `traces.measure` on the first batch of those, at those steps: values by layer.
    lost: the first logged step whose loss or gradient was not finite; None for none.
  """

  seed: int
  peak_lr: float
  steps: list[int] = dataclasses.field(default_factory=list)
  train_loss: list[float] = dataclasses.field(default_factory=list)
  train_accuracy: list[float] = dataclasses.field(default_factory=list)
  grad_norm: list[float] = dataclasses.field(default_factory=list)
  eval_steps: list[int] = dataclasses.field(default_factory=list)
  eval_loss: list[float] = dataclasses.field(default_factory=list)
  eval_accuracy: list[float] = dataclasses.field(default_factory=list)
  traces: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
  lost: int | None = None

  @property
  def onset(self) -> int | None:
    """The first logged step whose batch is answered right in more than half of its targets."""
    return next((n for n, a in zip(self.steps, self.train_accuracy) if a > ONSET), None)

  def line(self) -> dict[str, Any]:
    """Returns it as a record of a study, its numbers rounded to what is worth keeping."""
    keep = lambda x: float(f"{x:.4g}") if isinstance(x, float) and math.isfinite(x) else x
    fields = jax.tree.map(keep, dataclasses.asdict(self), is_leaf=lambda x: x is None)
    last = lambda name: fields[name][-1] if fields[name] else None
    return fields | {
      "onset": self.onset,
      "accuracy": None if self.lost else last("eval_accuracy"),
      "loss": None if self.lost else last("eval_loss"),
    }


def train(
  cfg: ml_collections.ConfigDict,
  seeds: Sequence[int],
  peak_lrs: Sequence[float],
  on_log: Callable[[int, list[Replica]], None] = lambda step, replicas: None,
  *,
  end_lr: float | None = None,
  on_end: Callable[[step_lib.Params], None] = lambda params: None,
) -> list[Replica]:
  """Trains every seed with every peak learning rate, on one device.

  Args:
    cfg: a run's config; its `seed` and `optim.peak_lr` are those of the replicas instead.
    seeds: of the initial parameters and of the order of the data.
    peak_lrs: learning rates after the warm-up.
    on_log: called with (step, replicas) after every logged step.
    end_lr: learning rate of the last step, the same at all peaks; None: the config's ratio of each.
    on_end: called with the parameters after the last step, [seeds, rates] before every other axis.

  Raises:
    UserError: a field of the config, or an empty list of seeds or rates.
  """
  config.check(cfg)
  if not seeds or not peak_lrs:
    raise UserError(f"seeds={list(seeds)} and peak_lrs={list(peak_lrs)}; accepted is at least one")
  dataset = data.load(cfg.data)
  ends = [cfg.optim.end_lr_ratio if end_lr is None else end_lr / peak for peak in peak_lrs]
  program = _Program.of(cfg, dataset, peak_lrs, ends)
  replicas = [[Replica(seed, lr) for lr in peak_lrs] for seed in seeds]
  flat = [replica for row in replicas for replica in row]
  rows = lambda split, **kw: data.loader(
    split,
    seq_len=cfg.seq_len,
    batch_size=cfg.batch_size,
    packing=cfg.data.packing,
    align=cfg.data.align,
    **kw,
  )
  held_out = [
    batch
    for _, batch in zip(
      range(cfg.eval.batches), rows(dataset.validation, shuffle=False, repeat=False)
    )
  ]
  loaders = [rows(dataset.train, seed=seed) for seed in seeds]
  given = functools.partial(data.model_inputs, dataset, cfg.data.packing)
  state = program.init(jnp.asarray(seeds, jnp.uint32))
  due = lambda n, every: every and (n % every == 0 or n == cfg.steps)
  for n in range(1, cfg.steps + 1):
    batch = jax.tree.map(lambda *x: np.stack(x), *(given(next(loader)) for loader in loaders))
    state, values = program.update(state, batch)
    if due(n, cfg.log.every):
      _note(n, replicas, jax.device_get(values))
    if due(n, cfg.eval.every):
      _evaluate(n, replicas, [program.evaluate(state.params, given(x)) for x in held_out])
      _trace(replicas, jax.device_get(program.trace(state.params, held_out[0])))
    if due(n, cfg.log.every):
      on_log(n, flat)
  on_end(state.params)
  return flat


class _Program:
  """The jitted functions of a study's cell, over [seeds, rates]."""

  def __init__(self, init, update, evaluate, trace):
    self.init, self.update, self.evaluate, self.trace = init, update, evaluate, trace

  @classmethod
  def of(cls, cfg, dataset, peak_lrs, end_lr_ratios) -> "_Program":
    lm_config = config.lm_config(cfg.model, dataset.vocab_size)
    fields = cfg.optim.to_dict()

    def optimizer(peak_lr, end_lr_ratio):  # numbers, or arrays of one replica
      recipe = fields | {"peak_lr": peak_lr, "end_lr_ratio": end_lr_ratio}
      return optim.optimizer(types.SimpleNamespace(**recipe), cfg.steps)

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: LM(lm_config, rngs=nnx.Rngs(0))), nnx.Param)
    sums_fn = step_lib.loss_fn(graphdef, z_loss=cfg.optim.z_loss, batch_shards=1)
    rates = jnp.asarray([peak_lrs, end_lr_ratios], jnp.float32).T

    def init(seed):
      make = lambda: LM(lm_config, rngs=nnx.Rngs(jax.random.key(seed)))
      state = step_lib.init_state(make, optimizer(*rates[0]))
      return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (len(peak_lrs), *x.shape)), state)

    def update(state, rate, batch):
      grads, sums = step_lib.gradients(sums_fn, state.params, batch, cfg.grad_accum)
      updates, opt_state = optimizer(*rate).update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      mean = step_lib.per_token(sums)
      values = {
        "train_loss": sums.nll / mean,
        "train_accuracy": sums.correct / mean,
        "grad_norm": optax.tree.norm(grads),
      }
      return step_lib.State(state.step + 1, params, opt_state), values

    def evaluate(params, batch):
      sums = sums_fn(params, batch)
      return jnp.stack([sums.nll, sums.correct, sums.count])

    def trace(params, batch):
      return traces.measure(nnx.merge(graphdef, params), batch, cfg.data)

    of_all = lambda f: jax.jit(_over(_over(f, (0, None)), (0, None)))
    per_rate = _over(update, (0, 0, None))
    return cls(
      init=jax.jit(_over(init, (0,))),
      update=jax.jit(_over(lambda s, b: per_rate(s, rates, b), (0, 0)), donate_argnums=0),
      evaluate=of_all(evaluate),
      trace=of_all(trace),
    )


def _over(f: Callable, in_axes: tuple[int | None, ...]) -> Callable:
  """Returns jax.vmap(f, in_axes); on a CPU a loop: batches of small products are slow there."""
  if jax.default_backend() != "cpu":
    return jax.vmap(f, in_axes)

  def looped(*args):
    def one(mapped):
      rest = iter(mapped)
      return f(*(x if axis is None else next(rest) for x, axis in zip(args, in_axes)))

    return jax.lax.map(one, [x for x, axis in zip(args, in_axes) if axis is not None])

  return looped


def _each(replicas):
  """Yields (position, replica) of all replicas that are not lost."""
  for i, row in enumerate(replicas):
    for j, replica in enumerate(row):
      if replica.lost is None:
        yield (i, j), replica


def _note(n: int, replicas, values) -> None:
  for at, replica in _each(replicas):
    replica.steps.append(n)
    for name, value in values.items():
      getattr(replica, name).append(float(value[at]))
    if not (math.isfinite(replica.train_loss[-1]) and math.isfinite(replica.grad_norm[-1])):
      replica.lost = n


def _evaluate(n: int, replicas, parts) -> None:
  nll, correct, count = np.moveaxis(np.sum(jax.device_get(parts), axis=0, dtype=np.float64), -1, 0)
  for at, replica in _each(replicas):
    replica.eval_steps.append(n)
    replica.eval_loss.append(float(nll[at] / count[at]))
    replica.eval_accuracy.append(float(correct[at] / count[at]))


def _trace(replicas, values) -> None:
  for at, replica in _each(replicas):
    for name, value in values.items():
      replica.traces.setdefault(name, []).append([float(x) for x in value[at]])

"""Trains a forecaster: windows drawn in epochs, early stopping on validation, errors on test.

The linear path and the cycle start in closed form (`start`), the blocks' output at 0; everything is
then trained together. The loss is that of the forecast in the series' standardised units, after the
window's own normalisation is undone.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from experiments import optim
from experiments.series import linear
from experiments.series.data import SPLITS, Series
from trellis_jax.forecaster import Forecaster, ForecasterConfig

LOSSES = {
  "mse": lambda e: e * e,
  "mae": jnp.abs,
  "huber": lambda e: optax.losses.huber_loss(e, delta=1.0),
}

RIDGE = 1e-3  # of the linear path's start, in units of its inputs' mean square


@dataclasses.dataclass
class Result:
  """A trained forecaster's record.

  Attributes:
    validation, test: errors of the best parameters by validation MSE.
    start: validation errors before the first step.
    best_step, steps: of the best parameters, made in all.
    curve: (step, validation MSE) of all evaluations.
    parameters: number of them.
  """

  validation: linear.Errors
  test: linear.Errors
  start: linear.Errors
  best_step: int
  steps: int
  curve: list[tuple[int, float]]
  parameters: int


@functools.cache
def start(series: Series, cfg: ForecasterConfig) -> tuple[np.ndarray, np.ndarray]:
  """(cycle [W, N], map A [L, horizon]) in closed form, one after the other, from the train windows.

  With a window's mean m and deviation d, the cycle is the c of the least error of m + d c over all
  rows of windows and forecasts, so sum d (x - m) / sum d^2 by phase, and A the least-squares map
  from x - m - d c to y - m - d c.
  """
  parts = functools.partial(linear.windows, series, "train", cfg.lookback, cfg.horizon)
  length, period = cfg.lookback + cfg.horizon, cfg.period
  places = series.places(period)
  moved, weight = np.zeros((2, period, cfg.channels))
  for x, y, at in parts() if period > 1 else ():
    mean, deviation = _level(x, cfg.eps)
    first = places[at]
    moves = deviation * (np.concatenate([x, y], axis=1) - mean)
    for p in np.unique(first):
      rows = (p + np.arange(length)) % period
      np.add.at(moved, rows, moves[first == p].sum(0))
      np.add.at(weight, rows, (deviation[first == p] ** 2).sum(0).repeat(length, axis=0))
  cycle = (moved / np.maximum(weight, cfg.eps)).astype(np.float32)

  def pairs():
    for x, y, at in parts():
      mean, deviation = _level(x, cfg.eps)
      rows = (places[at][:, None] + np.arange(length)[None]) % period
      level = mean + deviation * cycle[rows]
      yield x - level[:, : cfg.lookback], y - level[:, cfg.lookback :]

  return cycle, linear.least_squares(pairs(), (RIDGE,), bias=False)[0][0]


def _level(x: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
  """(mean, deviation) of windows [B, L, N], each [B, 1, N], as the forecaster takes them."""
  return x.mean(1, keepdims=True), np.sqrt(x.var(1, keepdims=True) + eps)


def run(
  series: Series,
  model: ForecasterConfig,
  cfg: ml_collections.ConfigDict,
  on_eval: Callable[[int, float], None] = lambda step, mse: None,
) -> Result:
  """Trains with `cfg.seed`, evaluating every `cfg.eval.every` steps."""
  program = _Program.of(model, cfg)
  values, phase = jnp.asarray(series.values), jnp.asarray(series.places(model.period), jnp.int32)
  starts = {s: series.starts(s, model.lookback, model.horizon) for s in SPLITS}
  errors = lambda params, split: program.errors(params, values, phase, starts[split])
  params = program.init(jax.random.key(cfg.seed))
  cycle, weights = start(series, model)
  params |= {"linear": jnp.asarray(weights, jnp.float32)}
  if model.period > 1:
    params |= {"cycle": jnp.asarray(cycle)}
  state = program.optimizer.init(params)
  first = errors(params, "validation")
  best, best_step, kept = first, 0, params
  curve, step = [(0, first.mse)], 0
  order = _order(starts["train"], cfg.seed)
  while step < cfg.steps:
    n = min(cfg.eval.every, cfg.steps - step)
    batch = next_rows(order, n, cfg.batch_size)
    key = jax.random.fold_in(jax.random.key(cfg.seed), step)
    params, state = program.train(params, state, key, values, phase, jnp.asarray(batch))
    step += n
    now = errors(params, "validation")
    curve.append((step, now.mse))
    on_eval(step, now.mse)
    if now.mse < best.mse:
      best, best_step, kept = now, step, params
    elif step - best_step >= cfg.eval.patience * cfg.eval.every:
      break
  count = sum(x.size for x in jax.tree.leaves(params))
  return Result(best, errors(kept, "test"), first, best_step, step, curve, count)


def _order(starts: np.ndarray, seed: int):
  """Yields train windows for ever, in another order each time."""
  rng = np.random.default_rng(seed)
  while True:
    yield from rng.permutation(starts)


def next_rows(order, steps: int, batch: int) -> np.ndarray:
  """The next windows [steps, batch]."""
  return np.array([next(order) for _ in range(steps * batch)], np.int32).reshape(steps, batch)


def windows(values, phase, starts, lookback: int, horizon: int):
  """(x [B, L, N], y [B, horizon, N], phase [B]) of the windows that begin at `starts`."""
  rows = values[starts[:, None] + jnp.arange(lookback + horizon)[None]]
  return rows[:, :lookback], rows[:, lookback:], phase[starts]


@dataclasses.dataclass(frozen=True)
class _Program:
  """The jitted functions of a forecaster; the same for all seeds."""

  init: Callable
  train: Callable
  sums: Callable
  optimizer: Any

  EVAL_BATCH = 128

  @classmethod
  def of(cls, model: ForecasterConfig, cfg: ml_collections.ConfigDict) -> "_Program":
    return _program(model, cfg.optim.to_json(sort_keys=True), cfg.loss, cfg.steps)

  def errors(self, params, values, phase, starts: np.ndarray) -> linear.Errors:
    """Errors over all windows; the last batch is filled with windows that do not count."""
    size = self.EVAL_BATCH
    padded = np.resize(starts, -(-len(starts) // size) * size).reshape(-1, size)
    weights = (np.arange(padded.size) < len(starts)).reshape(padded.shape)
    sums = self.sums(params, values, phase, jnp.asarray(padded), jnp.asarray(weights))
    total = np.sum(np.asarray(sums, np.float64), axis=0) / len(starts)
    return linear.Errors(*map(float, total))


@functools.cache
def _program(model: ForecasterConfig, optim_json: str, loss: str, steps: int) -> _Program:
  optimizer = optim.optimizer(ml_collections.ConfigDict(json.loads(optim_json)), steps)
  make = lambda key: Forecaster(model, rngs=nnx.Rngs(key))
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))), nnx.Param)

  def forecast(params, x, phase, key=None):
    forecaster = nnx.merge(graphdef, params)
    return forecaster(x, phase, rngs=None if key is None else nnx.Rngs(dropout=key))

  def objective(params, key, x, y, phase):
    return jnp.mean(LOSSES[loss](forecast(params, x, phase, key) - y))

  def train(params, state, key, values, phase, batches):
    def update(carry, starts):
      params, state, n = carry
      x, y, p = windows(values, phase, starts, model.lookback, model.horizon)
      grads = jax.grad(objective)(params, jax.random.fold_in(key, n), x, y, p)
      updates, state = optimizer.update(grads, state, params)
      return (optax.apply_updates(params, updates), state, n + 1), None

    return jax.lax.scan(update, (params, state, 0), batches)[0][:2]

  def sums(params, values, phase, batches, weights):
    def one(_, xs):
      starts, w = xs
      x, y, p = windows(values, phase, starts, model.lookback, model.horizon)
      e = forecast(params, x, p) - y
      per = jnp.stack([jnp.mean(e * e, axis=(1, 2)), jnp.mean(jnp.abs(e), axis=(1, 2))])
      return None, jnp.sum(per * w[None], axis=1)

    return jax.lax.scan(one, None, (batches, weights))[1]

  return _Program(
    jax.jit(lambda key: nnx.to_pure_dict(nnx.split(make(key), nnx.Param)[1])),
    jax.jit(train),
    jax.jit(sums),
    optimizer,
  )

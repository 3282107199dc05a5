"""DLinear (Zeng et al. 2023), trained as its authors train it: a published number made again.

    python -m experiments.series.grid FOLDER --models=dlinear

A window's trend is its moving average over 25 rows, its ends repeated; two linear maps that all
channels share read trend and remainder, and their sum is the forecast. Adam for 10 epochs, the rate
halved after each but the first, stopped after 3 epochs without a better validation error. Rates and
batch sizes are those of the authors' scripts, which are for a look-back of 336.

The hypothesis space is that of the closed form in `linear`, which finds the least squares that this
approaches: where the two differ from what is published, this one says what the training does, and
that data, split, scaling and errors are the published ones.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.series import linear
from experiments.series.data import SPLITS, Series

NAME = "dlinear"
TREND = 25  # rows of the moving average
EPOCHS, PATIENCE = 10, 3


class Recipe(NamedTuple):
  """What the authors choose by data set."""

  batch_size: int
  learning_rate: float


OTHERS = Recipe(32, 1e-4)
RECIPES = {
  "ETTh1": Recipe(32, 5e-3),
  "ETTh2": Recipe(32, 5e-2),
  "ETTm1": Recipe(8, 1e-4),
  "weather": Recipe(16, 1e-4),
  "exchange_rate": Recipe(8, 5e-4),
}


class Result(NamedTuple):
  """Errors of the best epoch by validation MSE, and which of how many it was."""

  validation: linear.Errors
  test: linear.Errors
  best_epoch: int
  epochs: int


def recipe(series: Series) -> Recipe:
  """The rate and batch size of a series."""
  return RECIPES.get(series.name, OTHERS)


def settings(series: Series) -> dict[str, Any]:
  """What decides a run's numbers besides data, window and seed, as it goes into a line."""
  return {**recipe(series)._asdict(), "epochs": EPOCHS, "patience": PATIENCE}


def init(key: jax.Array, lookback: int, horizon: int) -> dict[str, jax.Array]:
  """Maps [L, horizon] and biases [horizon], all uniform between -L^-1/2 and L^-1/2."""
  bound = lookback**-0.5
  shapes = {"trend": (lookback, horizon), "rest": (lookback, horizon), "bias": (2, horizon)}
  keys = jax.random.split(key, len(shapes))
  draw = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
  return {name: draw(k, shape) for k, (name, shape) in zip(keys, shapes.items())}


def trend_of(x: jax.Array) -> jax.Array:
  """The moving average of windows [B, L, N], as many rows."""
  ends = [(0, 0), (TREND // 2, TREND // 2), (0, 0)]
  total = jnp.cumsum(jnp.pad(x, ends, mode="edge"), axis=1)
  total = jnp.pad(total, [(0, 0), (1, 0), (0, 0)])
  return (total[:, TREND:] - total[:, :-TREND]) / TREND


def forecast(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  """[B, horizon, N] of windows [B, L, N]."""
  trend = trend_of(x)
  parts = jnp.einsum("bln,lh->bhn", trend, params["trend"])
  parts += jnp.einsum("bln,lh->bhn", x - trend, params["rest"])
  return parts + params["bias"].sum(0)[None, :, None]


def train(series: Series, lookback: int, horizon: int, seed: int) -> Result:
  """Trains on a series; ValueError where a split has no window, or train not one batch."""
  chosen, rng = recipe(series), np.random.default_rng(seed)
  starts = series.starts("train", lookback, horizon)
  if len(starts) < chosen.batch_size:
    raise ValueError(
      f"{series.name} has {len(starts)} train windows, but a batch of {NAME} takes"
      f" {chosen.batch_size}"
    )
  params = init(jax.random.key(seed), lookback, horizon)
  optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=chosen.learning_rate)
  state, best, bad = optimizer.init(params), None, 0
  values = jnp.asarray(series.values)
  run = jax.jit(functools.partial(_epoch, optimizer, lookback, horizon))
  apply = jax.jit(forecast)
  errors = lambda p, split: linear.errors_of(
    series, split, lookback, horizon, lambda x: np.asarray(apply(p, x))
  )
  for epoch in range(1, EPOCHS + 1):
    rate = chosen.learning_rate * 0.5 ** max(0, epoch - 2)
    state.hyperparams["learning_rate"] = jnp.asarray(rate, jnp.float32)
    steps = len(starts) // chosen.batch_size
    at = rng.permutation(starts)[: steps * chosen.batch_size].reshape(steps, chosen.batch_size)
    params, state = run(params, state, values, at)
    found = errors(params, "validation")
    if best is None or found.mse < best[0].mse:
      best, bad = (found, params, epoch), 0
    elif (bad := bad + 1) == PATIENCE:
      break
  return Result(best[0], errors(best[1], SPLITS[2]), best[2], epoch)


def _epoch(optimizer, lookback: int, horizon: int, params, state, values, starts):
  """Parameters and optimiser's state after steps on windows that begin at `starts` [steps, B]."""
  rows = jnp.arange(lookback + horizon)

  def loss(params, at):
    windows = values[at[:, None] + rows[None]]
    wrong = forecast(params, windows[:, :lookback]) - windows[:, lookback:]
    return jnp.mean(wrong * wrong)

  def step(carry, at):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params, at), state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, state), starts)[0]

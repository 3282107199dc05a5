"""Forecasts without training: the last value again, and the best linear map in closed form.

A linear map reads a channel's window v = [x_1 ... x_L, 1] or, `centred`, [x - mean x] and adds the
mean again. All channels share it. With V the windows of all train channels and Y what follows,

  W = (V^T V + lambda tr(V^T V) / L I)^-1 V^T Y,     lambda the best of RIDGES on validation.

The plain map is DLinear's hypothesis space (Zeng et al. 2023: trend and remainder are linear in x,
so their two maps are one), the centred one NLinear's: it follows a shift of the level.
"""

from typing import NamedTuple

import numpy as np

from experiments.series.data import Series

RIDGES = (1e-6, 1e-3, 1e-2)
_ROWS = 4096  # windows at a time


class Errors(NamedTuple):
  """Means over windows, horizon and channels of standardised values."""

  mse: float
  mae: float


def repeat_last(series: Series, split: str, lookback: int, horizon: int) -> Errors:
  """Errors of the forecast that repeats a window's last row."""
  return errors_of(series, split, lookback, horizon, lambda x: x[:, -1:, :])


class Linear(NamedTuple):
  """A fitted map: forecast = x W (+ bias), or mean x + (x - mean x) W when centred."""

  weights: np.ndarray  # [L, horizon]
  bias: np.ndarray  # [horizon]
  centred: bool
  ridge: float

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """Forecasts [B, horizon, N] of windows [B, L, N]."""
    mean = x.mean(1, keepdims=True) if self.centred else 0.0
    y = np.swapaxes(x - mean, 1, 2) @ self.weights + self.bias[None, None]
    return np.swapaxes(y, 1, 2) + mean

  def errors(self, series: Series, split: str) -> Errors:
    """Errors on a split."""
    return errors_of(series, split, *self.weights.shape, self)


def fit(
  series: Series, lookback: int, horizon: int, *, centred: bool = False, ridges=RIDGES
) -> Linear:
  """The least-squares map of the train windows; the ridge is chosen on validation."""

  def pairs():
    for x, y, _ in windows(series, "train", lookback, horizon):
      mean = x.mean(1, keepdims=True) if centred else np.float32(0)
      yield x - mean, y - mean

  solved = least_squares(pairs(), ridges, bias=not centred)
  fitted = [Linear(w, b, centred, ridge) for ridge, (w, b) in zip(ridges, solved)]
  if len(fitted) == 1:
    return fitted[0]
  return min(fitted, key=lambda m: m.errors(series, "validation").mse)


def least_squares(pairs, ridges, *, bias: bool) -> list[tuple[np.ndarray, np.ndarray]]:
  """(weights [L, horizon], bias [horizon]) for each ridge.

  Args:
    pairs: (inputs [B, L, N], targets [B, horizon, N]), all channels and windows alike.
    ridges: in units of the inputs' mean square; the bias is not shrunk.
    bias: whether there is one.
  """
  gram, cross = 0.0, 0.0
  for x, y in pairs:
    v = np.swapaxes(x, 1, 2).reshape(-1, x.shape[1]).astype(np.float64)
    v = np.pad(v, ((0, 0), (0, 1)), constant_values=float(bias))
    gram = gram + v.T @ v
    cross = cross + v.T @ np.swapaxes(y, 1, 2).reshape(-1, y.shape[1])
  size = len(gram) - 1
  unit = np.trace(gram[:size, :size]) / size
  found = []
  for ridge in ridges:
    penalty = np.append(np.full(size, ridge * unit), 0.0 if bias else 1.0)
    w = np.linalg.solve(gram + np.diag(penalty), cross)
    found.append((w[:-1], w[-1]))
  return found


def windows(series: Series, split: str, lookback: int, horizon: int):
  """Yields (x [B, L, N], y [B, horizon, N], first rows [B]) of all windows of a split."""
  starts = series.starts(split, lookback, horizon)
  view = np.lib.stride_tricks.sliding_window_view(series.values, lookback + horizon, axis=0)
  step = max(1, _ROWS // series.values.shape[1])
  for i in range(0, len(starts), step):
    at = starts[i : i + step]
    rows = np.swapaxes(view[at[0] : at[-1] + 1], 1, 2)
    yield rows[:, :lookback], rows[:, lookback:], at


def errors_of(series: Series, split: str, lookback: int, horizon: int, forecast) -> Errors:
  """Errors on a split of `forecast`, [B, L, N] to [B, horizon, N]."""
  squared = absolute = count = 0.0
  for x, y, _ in windows(series, split, lookback, horizon):
    error = (forecast(x) - y).astype(np.float64)
    squared += float(np.sum(error * error))
    absolute += float(np.sum(np.abs(error)))
    count += error.size
  return Errors(squared / count, absolute / count)

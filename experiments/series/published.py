"""Published errors at look-back 96, (MSE, MAE) of standardised values, that ours stand beside.

DLinear, iTransformer: by horizon, as in table 10 of Liu et al. 2024 (iTransformer), which ran both.
Titans: "neural memory" of Behrouz et al. 2025, averages over the four horizons alone.
"""

import statistics

HORIZONS = (96, 192, 336, 720)
DATASETS = ("ETTh1", "ETTh2", "ETTm1", "weather", "exchange_rate")

BY_HORIZON = {
  "DLinear": {
    "ETTh1": ((0.386, 0.400), (0.437, 0.432), (0.481, 0.459), (0.519, 0.516)),
    "ETTh2": ((0.333, 0.387), (0.477, 0.476), (0.594, 0.541), (0.831, 0.657)),
    "ETTm1": ((0.345, 0.372), (0.380, 0.389), (0.413, 0.413), (0.474, 0.453)),
    "weather": ((0.196, 0.255), (0.237, 0.296), (0.283, 0.335), (0.345, 0.381)),
    "exchange_rate": ((0.088, 0.218), (0.176, 0.315), (0.313, 0.427), (0.839, 0.695)),
  },
  "iTransformer": {
    "ETTh1": ((0.386, 0.405), (0.441, 0.436), (0.487, 0.458), (0.503, 0.491)),
    "ETTh2": ((0.297, 0.349), (0.380, 0.400), (0.428, 0.432), (0.427, 0.445)),
    "ETTm1": ((0.334, 0.368), (0.377, 0.391), (0.426, 0.420), (0.491, 0.459)),
    "weather": ((0.174, 0.214), (0.221, 0.254), (0.278, 0.296), (0.358, 0.347)),
    "exchange_rate": ((0.086, 0.206), (0.177, 0.299), (0.331, 0.417), (0.847, 0.691)),
  },
}
AVERAGES = {
  "Titans": {
    "ETTh1": (0.420, 0.421),
    "ETTh2": (0.336, 0.382),
    "ETTm1": (0.358, 0.387),
    "weather": (0.231, 0.265),
  },
}


def by_horizon(model: str, dataset: str, horizon: int) -> tuple[float, float] | None:
  """(MSE, MAE) of a published model, None where there is none."""
  found = BY_HORIZON.get(model, {}).get(dataset)
  return found[HORIZONS.index(horizon)] if found and horizon in HORIZONS else None


def average(model: str, dataset: str) -> tuple[float, float] | None:
  """(MSE, MAE) of a published model over the four horizons, None where there is none."""
  if found := BY_HORIZON.get(model, {}).get(dataset):
    # Ties are rounded up, as in the published averages.
    return tuple(statistics.fmean(errors) + 1e-9 for errors in zip(*found))
  return AVERAGES.get(model, {}).get(dataset)

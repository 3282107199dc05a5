"""Trains a forecaster on a series and prints its errors beside those of closed forms.

    python -m experiments.series.main --config=experiments/configs/series/default.py \\
      --config.data.path=FILE.csv --config.horizon=192

FILE.csv has a column of dates and then one per channel. The run's record is appended to
`config.results`. Exit code 2 for a mistake in what was asked, with one sentence on stderr.
"""

import json
import pathlib
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import rich.console
from ml_collections import ConfigDict

from experiments import allocator, config, metrics, provenance
from experiments.series import data, dlinear, linear, settings, train

CODE = ("trellis_jax", "pallas_kernels", "experiments")
BASELINES = ("last", "linear", "linear_centred")
Say = Callable[[str], None]


def labels(cfg: ConfigDict, series: data.Series, model: str = "") -> dict[str, Any]:
  """What tells a run from the others of a table, apart from its seed."""
  if not model:
    model = ",".join(config.mixer_pattern(cfg.model)) if cfg.model.num_layers else "linear_cycle"
  return {"dataset": series.name, "horizon": cfg.horizon, "model": model}


def record(cfg: ConfigDict, series: data.Series, command: str, say: Say) -> dict[str, Any]:
  """Trains, and returns the line of a results file."""
  begin = time.perf_counter()
  on_eval = lambda step, mse: say(f"step {step}/{cfg.steps}  validation mse {mse:.4f}")
  result = train.run(series, settings.forecaster(cfg, series), cfg, on_eval)
  return {
    "labels": labels(cfg, series),
    "seed": cfg.seed,
    **_errors(result.validation, result.test),
    "start_validation_mse": round(result.start.mse, 5),
    "best_step": result.best_step,
    "steps": result.steps,
    "curve": [(n, round(mse, 4)) for n, mse in result.curve],
    "parameters": result.parameters,
    **_origin(begin, command),
    "settings": settings.decisive(cfg),
  }


def baselines(cfg: ConfigDict, series: data.Series, command: str) -> list[dict[str, Any]]:
  """The lines of the forecasts without training."""
  lines = []
  for name in BASELINES:
    begin = time.perf_counter()
    if name == "last":
      found = [linear.repeat_last(series, s, cfg.lookback, cfg.horizon) for s in data.SPLITS[1:]]
      more = {}
    else:
      fitted = linear.fit(series, cfg.lookback, cfg.horizon, centred=name == "linear_centred")
      found = [fitted.errors(series, split) for split in data.SPLITS[1:]]
      more = {"ridge": fitted.ridge}
    line = {"labels": labels(cfg, series, name), "seed": None, **_errors(*found), **more}
    lines.append(line | _origin(begin, command) | {"settings": settings.windows(cfg)})
  return lines


def dlinear_record(cfg: ConfigDict, series: data.Series, command: str) -> dict[str, Any]:
  """The line of a DLinear trained by its authors' recipe, on the config's windows."""
  begin = time.perf_counter()
  result = dlinear.train(series, cfg.lookback, cfg.horizon, cfg.seed)
  return {
    "labels": labels(cfg, series, dlinear.NAME),
    "seed": cfg.seed,
    **_errors(result.validation, result.test),
    "best_epoch": result.best_epoch,
    "epochs": result.epochs,
    **_origin(begin, command),
    "settings": settings.windows(cfg) | dlinear.settings(series),
  }


def _errors(validation: linear.Errors, test: linear.Errors) -> dict[str, float]:
  """Errors as they go into a line."""
  return {
    "mse": round(test.mse, 5),
    "mae": round(test.mae, 5),
    "validation_mse": round(validation.mse, 5),
  }


def _origin(begin: float, command: str) -> dict[str, Any]:
  """Where a line comes from."""
  return {
    "seconds": round(time.perf_counter() - begin, 1),
    "revision": provenance.revision(*CODE),
    "jax": jax.__version__,
    "command": command,
  }


def append(path: pathlib.Path, lines: list[dict[str, Any]], drop=()) -> None:
  """Adds lines to a results file, in the place of earlier ones of the same run and of `drop`."""
  key = lambda line: (line["labels"], line["seed"], line["settings"])
  old, new = metrics.read(path) if path.exists() else [], [key(line) for line in lines]
  kept = [line for line in old if key(line) not in new and line not in drop]
  provenance.write(path, "".join(json.dumps(line) + "\n" for line in [*kept, *lines]))


def main(argv: list[str]) -> int:
  """Runs the command line `argv` and returns its exit code."""
  if {"--help", "-h"} & set(argv):
    print(__doc__, "Fields of the default config:", settings.parse(argv[:1]), sep="\n")
    return 0
  console = rich.console.Console(highlight=False, markup=False, soft_wrap=True)
  allocator.keep_freed_memory()
  command = shlex.join(["python", "-m", "experiments.series.main", *argv[1:]])
  try:
    cfg = settings.parse(argv)
    series = settings.load(cfg)
    for split in data.SPLITS:
      series.starts(split, cfg.lookback, cfg.horizon)
    settings.forecaster(cfg, series)
    lines = baselines(cfg, series, command)
    lines.append(record(cfg, series, command, console.print))
  except ValueError as e:
    print("error:", " ".join(str(e).split()), file=sys.stderr)
    return 2
  for line in lines:
    name = line["labels"]["model"]
    console.print(f"{name:16} test mse {line['mse']:.4f}  mae {line['mae']:.4f}")
  if cfg.results:
    append(pathlib.Path(cfg.results), lines)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))

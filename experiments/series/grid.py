"""Runs a grid of series x horizons x models x seeds, and writes its table.

    python -m experiments.series.grid FOLDER
    python -m experiments.series.grid FOLDER --datasets=ETTh1 --models=trellis,mamba2 --seeds=0

FOLDER holds DATASET.csv, itself or below it. Each run adds its line to RESULTS/DATASET.jsonl and is
not made again unless its settings change; machines may share the work by --datasets. `linear_cycle`
is the model without blocks, `dlinear` the published DLinear by its authors' recipe. Any
`--config=FILE` and `--config.FIELD=VALUE` is that of all runs.
"""

import argparse
import itertools
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.console
from ml_collections import ConfigDict

from experiments import allocator, metrics
from experiments.errors import UserError
from experiments.series import dlinear, settings, table
from experiments.series import main as single
from experiments.series.published import DATASETS, HORIZONS
from trellis_jax import mixers

WITHOUT_BLOCKS = "linear_cycle"
_WINDOWS = ("lookback", "data.rows", "data.columns")  # fields that DLinear's runs depend on


def find(folder: pathlib.Path, dataset: str) -> pathlib.Path:
  """The CSV of a dataset; UserError when there is none, or more than one."""
  found = sorted(folder.expanduser().rglob(f"{dataset}.csv"))
  if len(found) != 1:
    raise UserError(f"{folder} holds {len(found)} files {dataset}.csv, but it must hold one")
  return found[0]


def cells(base: ConfigDict, args: argparse.Namespace) -> Iterator[tuple[str, ConfigDict]]:
  """(model, config) of all runs; the seeds of all settings come one after the other."""
  paths = {name: find(args.folder, name) for name in args.datasets}
  for seed, name in itertools.product(args.seeds, args.datasets):
    for horizon, model in itertools.product(args.horizons, args.models):
      cfg = base.copy_and_resolve_references()
      cfg.data.path, cfg.horizon, cfg.seed = str(paths[name]), horizon, seed
      if model == WITHOUT_BLOCKS:
        cfg.model.num_layers = 0
      elif model != dlinear.NAME:
        cfg.model.mixer = model
      yield model, cfg


def run(base: ConfigDict, args: argparse.Namespace, console: rich.console.Console) -> None:
  """Runs what is missing, and writes lines and table as it goes."""
  todo, loaded, busy = list(cells(base, args)), {}, []
  for number, (model, cfg) in enumerate(todo, 1):
    if cfg.data.path not in loaded:
      loaded[cfg.data.path] = settings.load(cfg)
    series = loaded[cfg.data.path]
    path = args.results / f"{series.name}.jsonl"
    lines = metrics.read(path) if path.exists() else []
    begin, new = time.perf_counter(), _baselines(cfg, series, lines)
    labels, wanted, make = _cell(model, cfg, series)
    of_cell = [line for line in lines if line["labels"] == labels]
    if not any(line["seed"] == cfg.seed and line["settings"] == wanted for line in of_cell):
      new.append(make())
    if not new:
      continue
    stale = [line for line in of_cell if line["settings"] != wanted]
    single.append(path, new, drop=stale)
    table.write(args.results)
    busy.append(time.perf_counter() - begin)
    left = (len(todo) - number) * sum(busy) / len(busy)
    console.print(
      f"{number}/{len(todo)} {' '.join(map(str, labels.values()))} seed {cfg.seed}: "
      f"mse {new[-1]['mse']:.4f} mae {new[-1]['mae']:.4f} {busy[-1]:.0f} s, "
      f"eta {left // 3600:.0f}:{left // 60 % 60:02.0f}"
    )


def _cell(model: str, cfg: ConfigDict, series) -> tuple[dict, dict, Callable[[], dict[str, Any]]]:
  """(labels, settings, what makes the line) of a run."""
  if model == dlinear.NAME:
    labels = single.labels(cfg, series, model)
    wanted = settings.windows(cfg) | dlinear.settings(series)
    return labels, wanted, lambda: single.dlinear_record(cfg, series, _dlinear_command(cfg, series))
  make = lambda: single.record(cfg, series, _command(cfg), lambda text: None)
  return single.labels(cfg, series), settings.decisive(cfg), make


def _baselines(cfg, series, lines) -> list[dict[str, Any]]:
  """Lines of the forecasts without training that a file does not have yet."""
  have = [line["labels"] for line in lines]
  wanted = [single.labels(cfg, series, name) for name in single.BASELINES]
  if all(labels in have for labels in wanted):
    return []
  return single.baselines(cfg, series, _command(cfg))


def _command(cfg: ConfigDict) -> str:
  """The command of one run of a grid."""
  default = settings.parse(["grid"])
  flags = [f"--config.{k}={v}" for k, v in _changes(default, cfg)]
  return shlex.join(["python", "-m", "experiments.series.main", *flags])


def _dlinear_command(cfg: ConfigDict, series) -> str:
  """The command of one run of DLinear."""
  which = [f"--datasets={series.name}", f"--horizons={cfg.horizon}", f"--seeds={cfg.seed}"]
  changed = dict(_changes(settings.parse(["grid"]), cfg))
  flags = [f"--config.{k}={v}" for k, v in changed.items() if k in _WINDOWS]
  command = ["python", "-m", "experiments.series.grid", "FOLDER", f"--models={dlinear.NAME}"]
  return shlex.join([*command, *which, *flags])


def _changes(default: ConfigDict, cfg: ConfigDict, at: str = "") -> Iterator[tuple[str, Any]]:
  """(dotted name, value) of the fields that differ; of the file its name, whatever its folder."""
  for key, value in cfg.items():
    if isinstance(value, ConfigDict):
      yield from _changes(default[key], value, f"{at}{key}.")
    elif at + key == "data.path":
      yield at + key, pathlib.Path(value).name
    elif value != default[key]:
      yield at + key, value


def _parse(argv: list[str]) -> tuple[ConfigDict, argparse.Namespace]:
  """(config of all runs, what to run); UserError for a mistake in either."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  words = lambda text: text.split(",")
  numbers = lambda text: [int(n) for n in text.split(",")]
  parser.add_argument("folder", type=pathlib.Path, help="of the CSV files")
  parser.add_argument("--datasets", type=words, default=DATASETS, help="names of the files")
  parser.add_argument("--horizons", type=numbers, default=HORIZONS, help="rows to forecast")
  parser.add_argument(
    "--models", type=words, default=["trellis"], help="mixers, linear_cycle, dlinear"
  )
  parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
  parser.add_argument("--results", type=pathlib.Path, default=table.RESULTS, help="folder")
  args, rest = parser.parse_known_args(argv[1:])
  accepted = [*mixers.names(), WITHOUT_BLOCKS, dlinear.NAME]
  if unknown := [m for m in args.models if m not in accepted]:
    raise UserError(f"--models={unknown[0]} is unknown; accepted are {', '.join(accepted)}")
  return settings.parse([*argv[:1], *rest]), args


def main(argv: list[str]) -> int:
  """Runs the command line `argv`; 2 for a mistake in what was asked, one sentence on stderr."""
  console = rich.console.Console(highlight=False, markup=False, soft_wrap=True)
  allocator.keep_freed_memory()
  try:
    base, args = _parse(argv)
    run(base, args, console)
  except ValueError as e:
    print("error:", " ".join(str(e).split()), file=sys.stderr)
    return 2
  table.write(args.results, console.print)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))

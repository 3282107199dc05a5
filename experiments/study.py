"""Runs a study: a grid of settings, each over seeds and learning rates; prints its table.

    python -m experiments.study mqar_mixers
    python -m experiments.study mqar_mixers --only=mixer=gla --only=pairs=8

A study is a file of experiments/configs/study with `SEEDS`, `LEARNING_RATES`, `COLUMNS` and
`cells()`, which yields (labels, config). Every replica adds a line to
benchmarks/results/study/NAME.jsonl and is not run again unless its config changes; NAME.md holds
the table. Of a setting's learning rates the table shows the one with the best mean over seeds.
Where `LEARNING_RATES` is empty a setting has the one of its config, shown as it is. `TRACES`,
where a study has it, names what its figure shows beside the accuracy (experiments/traces.py).
"""

import argparse
import importlib
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import rich.console
import rich.progress
import tabulate
from flax import nnx

from experiments import allocator, config, metrics, provenance, replicas, tasks
from experiments.errors import UserError
from trellis_jax import LM

FOLDER = pathlib.Path(__file__).parent / "configs" / "study"
RESULTS = provenance.ROOT / "benchmarks" / "results" / "study"
_CODE = ("trellis_jax", "pallas_kernels", "experiments")
# What a replica's line must agree on to stand for a setting.
_FIELDS = ("steps", "batch_size", "seq_len", "data", "model", "optim")


def get(name: str):
  """The module of a study; UserError for an unknown name lists the folder."""
  names = sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_"))
  if name not in names:
    raise UserError(f"study {name!r} is unknown; accepted are {', '.join(names)}")
  return importlib.import_module(f"experiments.configs.study.{name}")


def rates(study, cfg) -> tuple[float, ...]:
  """The learning rates that a setting is run with."""
  return tuple(study.LEARNING_RATES) or (cfg.optim.peak_lr,)


def settings(cfg) -> dict[str, Any]:
  """What of a config decides a replica's numbers, apart from its seed and learning rate."""
  fields = {k: v for k, v in json.loads(cfg.to_json_best_effort()).items() if k in _FIELDS}
  fields["optim"].pop("peak_lr")
  fields["model"].pop("scan_layers")  # how it is compiled alone
  model, pattern = fields["model"], fields["model"]["mixer"].split(",")
  others = [k for k, v in model.items() if isinstance(v, dict) and k not in pattern]
  for name in others:  # knobs of mixers that the model does not have
    model.pop(name)
  for name in {*tasks.names(), "cache"} - {cfg.data.task}:  # nor of other tasks
    fields["data"].pop(name, None)
  return fields


def run(study, only: dict[str, str], path: pathlib.Path, console: rich.console.Console) -> None:
  """Runs what is missing of a study, and writes its lines as they end."""
  read = lambda: metrics.read(path) if path.exists() else []
  cells = [(labels, cfg) for labels, cfg in study.cells() if _chosen(labels, only)]
  if not cells:
    raise UserError(f"--only={only} fits no setting of the study")
  for number, (labels, cfg) in enumerate(cells, 1):
    wanted = settings(cfg)
    same = lambda line: line["labels"] == labels and line["settings"] == wanted
    have = {(line["seed"], line["peak_lr"]) for line in read() if same(line)}
    if all((s, r) in have for s in study.SEEDS for r in rates(study, cfg)):
      continue
    name = " ".join(f"{k}={v}" for k, v in labels.items())
    start, origin = (
      time.perf_counter(),
      {"revision": provenance.revision(*_CODE), "jax": jax.__version__},
    )
    done = _train(study, cfg, f"{number}/{len(cells)} {name}", console)
    about = {"seconds": round(time.perf_counter() - start, 1), "replicas": len(done)}
    about |= {"floats_of_state": state_floats(cfg), "parameters": parameters(cfg)}
    found = [{"labels": labels, **r.line(), **about, **origin, "settings": wanted} for r in done]
    with provenance.sole_writer(path):  # other processes may run other settings
      lines = [line for line in read() if line["labels"] != labels] + found
      provenance.write(path, "".join(json.dumps(line) + "\n" for line in lines))
    best = max((r.eval_accuracy[-1] for r in done if r.lost is None), default=float("nan"))
    console.print(f"{number}/{len(cells)} {name}: best {best:.3f}, {about['seconds']:.0f} s")


def _chosen(labels: dict[str, Any], only: dict[str, str]) -> bool:
  return all(str(labels.get(k)) in v.split(",") for k, v in only.items())


def _train(study, cfg, name: str, console: rich.console.Console) -> list[replicas.Replica]:
  columns = (
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.TextColumn("{task.completed}/{task.total}"),
    rich.progress.TimeRemainingColumn(),
  )
  with rich.progress.Progress(*columns, console=console, transient=True) as progress:
    task = progress.add_task(name, total=cfg.steps)

    def on_log(step, now):
      shown = " ".join(f"{r.train_accuracy[-1]:.2f}" for r in now)
      progress.update(task, completed=step, description=f"{name} {shown}")

    return replicas.train(cfg, study.SEEDS, rates(study, cfg), on_log)


def _lm(cfg):
  vocab = tasks.load(cfg.data).vocab_size if cfg.data.task else cfg.data.vocab_size
  return nnx.eval_shape(lambda: LM(config.lm_config(cfg.model, vocab), rngs=nnx.Rngs(0)))


def state_floats(cfg) -> int:
  """The floats that a row carries from token to token."""
  return _lm(cfg).state_size()


def parameters(cfg) -> int:
  """The model's parameters."""
  return sum(x.size for x in jax.tree.leaves(_lm(cfg)))


def best_rate(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """The lines of the learning rate with the best mean accuracy; a lost replica counts as 0."""
  by_rate: dict[float, list] = {}
  for line in lines:
    by_rate.setdefault(line["peak_lr"], []).append(line)
  mean = lambda group: statistics.fmean(line["accuracy"] or 0.0 for line in group)
  return max(by_rate.values(), key=mean)


def cell(lines: list[dict[str, Any]]) -> str:
  """ "0.98 (0.95-1.00) 240": mean, range over seeds, and median onset of the best rate."""
  if not lines:
    return ".."
  lines = best_rate(lines)
  scores = [line["accuracy"] or 0.0 for line in lines]
  onsets = sorted(line["onset"] or 10**9 for line in lines)
  onset = onsets[len(onsets) // 2]
  mean = statistics.fmean(scores)
  spread = f"{mean:.2f} ({min(scores):.2f}-{max(scores):.2f})"
  return f"{spread} {onset if onset < 10**9 else '-'}"


def table(study, lines: list[dict[str, Any]]) -> str:
  """The grid: one row per value of the labels but `COLUMNS`, one column per value of those."""
  keys = [labels for labels, _ in study.cells()]
  row_of = lambda labels: tuple(str(v) for k, v in labels.items() if k not in study.COLUMNS)
  column_of = lambda labels: ", ".join(f"{k} {labels[k]}" for k in study.COLUMNS)
  rows, columns = list(dict.fromkeys(map(row_of, keys))), list(dict.fromkeys(map(column_of, keys)))
  body = []
  for row in rows:
    of = lambda column: [
      line
      for line in lines
      if row_of(line["labels"]) == row and column_of(line["labels"]) == column
    ]
    body.append([" ".join(row), *(cell(of(column)) for column in columns)])
  name = " ".join(k for k in keys[0] if k not in study.COLUMNS)
  return tabulate.tabulate(body, [name, *columns], tablefmt="github", disable_numparse=True)


def report(study, name: str, lines: list[dict[str, Any]]) -> str:
  """The text of NAME.md."""
  revisions = " ".join(sorted({line["revision"] for line in lines})) or "none yet"
  swept = ", ".join(f"{r:g}" for r in study.LEARNING_RATES)
  swept = f"; learning rates {swept}, of which each cell shows the best" if swept else ""
  about = study.__doc__.split("\n\n", 2)[-1].strip()
  return f"""    python -m experiments.study {name}

{about}

Seeds {", ".join(map(str, study.SEEDS))}{swept}:
mean accuracy on held-out examples (least-most over seeds), then the median step at which more than
half of a batch is answered right. A replica whose numbers are no longer finite counts as 0.
Revisions: {revisions}.

{table(study, lines)}
"""


def main(argv: list[str]) -> int:
  """Runs the command line `argv`; 2 for a mistake in what was asked, one sentence on stderr."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("study", help="a file of experiments/configs/study")
  parser.add_argument("--only", action="append", default=[], help="LABEL=VALUE[,VALUE]")
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of the lines")
  args = parser.parse_args(argv[1:])
  console = rich.console.Console(highlight=False, emoji=False, markup=False)
  allocator.keep_freed_memory()
  try:
    study = get(args.study)
    if bad := [x for x in args.only if "=" not in x]:
      raise UserError(f"--only={bad[0]} is given; accepted is LABEL=VALUE")
    path = args.results / f"{args.study}.jsonl"
    run(study, dict(x.split("=", 1) for x in args.only), path, console)
  except ValueError as e:
    print("error:", " ".join(str(e).split()), file=sys.stderr)
    return 2
  text = report(study, args.study, metrics.read(path))
  provenance.write(path.with_suffix(".md"), text)
  console.print(text)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))

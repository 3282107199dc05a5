r"""Trains and scores the rows of a table of the paper, one after the other.

    python -m experiments.tables.run table4 --scale=mini --data=FOLDER
    python -m experiments.tables.run table4 --scale=mini --data=FOLDER \
      --only=model=trellis,gated_delta_net --only=context=512,8192 --seeds=0,1,2

The table is a file of experiments/configs/paper. A row is trained at its three learning rates with
the first seed, with further seeds at the rate whose validation loss was least. Then it is read on
the validation and test splits in windows of the length that it was trained at, whole and by
position (evals/lengths.py), and adds a line to benchmarks/results/lm/TABLE.jsonl. What has its line
is not run again unless settings or text change; what was stopped goes on from its checkpoint.
`--only` splits the rows over machines; the lines of all of them are one file's. `make tables`
writes the tables. Flags:

    --scale=mini        or midi, small, paper
    --data=PATH         text, as config.data.path; without, the standard library (small scales), or
                        what the row names (paper)
    --seeds=0           separated by commas
    --only=LABEL=VALUE[,VALUE]
    --tokens=N          trained on by every row, in place of the scale's; such rows are a table of
                        their own
    --score_tokens=N    read of each of the two splits, 0 for all; 131,072 at mini and midi without
    --rates=all         every seed at all three rates; or 1: the row's own rate alone
    --together          all runs of a row that can start in one program (tables/together.py): for
                        small models on an accelerator; what is stopped is lost
    --tasks=PATH        of table1: folder of the tasks' files; of table3: the needles' haystack
    --results=FOLDER    of the lines;   --workdir=FOLDER  of the runs
"""

import argparse
import gc
import hashlib
import importlib
import json
import pathlib
import re
import shlex
import statistics
import sys
import time
from typing import Any

import jax
import rich.console
from flax import nnx

from experiments import allocator, checkpoint, data, metrics, provenance, study, train
from experiments.configs.paper import base, table1, table3
from experiments.errors import UserError
from experiments.evals import harness, harness_tasks, lengths, niah, runs
from experiments.metrics import NotFiniteError
from experiments.tables import lines as lines_lib
from experiments.tables import together

FOLDER = pathlib.Path(base.__file__).parent
RESULTS = provenance.ROOT / "benchmarks" / "results" / "lm"
NO_TABLE = ("__init__", "base")
SCORE_TOKENS = {"paper": 0, "small": 0, "midi": 1 << 17, "mini": 1 << 17}
SAMPLES = {"paper": 500, "small": 500, "midi": 50, "mini": 50}  # of each needle and length
_TIME = "time/step_seconds"
_CODE = ("trellis_jax", "pallas_kernels", "experiments")


def get(name: str):
  """The module of a table; UserError for an unknown name lists the folder."""
  names = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in NO_TABLE)
  if name not in names:
    raise UserError(f"table {name!r} is unknown; accepted are {', '.join(names)}")
  return importlib.import_module(f"experiments.configs.paper.{name}")


def chosen(module, args: argparse.Namespace) -> list[base.Row]:
  """The rows that a command line asks for, with its text and tokens."""
  base.check(args.scale)
  rows = list(module.rows(args.scale))
  for label, values in args.only.items():
    if label not in rows[0].labels:
      raise UserError(f"--only={label}=... is given; the labels are {', '.join(rows[0].labels)}")
    have = list(dict.fromkeys(str(row.labels[label]) for row in rows))
    if bad := [v for v in values if v not in have]:
      raise UserError(f"--only={label}={bad[0]} is given; accepted are {', '.join(have)}")
  rows = [
    row
    for row in rows
    if all(str(row.labels[label]) in values for label, values in args.only.items())
  ]
  for row in rows:
    cfg = row.config
    cfg.workdir = str(args.workdir / "unsaved")  # a run that saves has a folder of its own
    if args.data:
      cfg.data.path = args.data
    if cfg.data.task == "niah":
      if args.data:
        raise UserError(
          f"--data={args.data} is given, but at {args.scale} {args.table} is trained on needles,"
          " whose haystack --tasks names"
        )
      cfg.data.path = cfg.data.niah.haystack = args.tasks
    if args.tokens:
      steps, grow = cfg.steps, cfg.data.niah.grow_examples
      cfg.steps = max(1, round(args.tokens / (cfg.batch_size * cfg.seq_len)))
      cfg.optim.warmup_steps = cfg.steps // 10
      cfg.data.niah.grow_examples = round(grow * cfg.steps / steps)  # as long a part of the run
  return rows


def text_of(row: base.Row) -> data.Dataset:
  """A row's text, prepared here when absent; that of a row on needles is their haystack."""
  section = row.config.data.copy_and_resolve_references()
  section.task = ""
  return data.load_text(section)


def settings(cfg) -> dict[str, Any]:
  """What decides a run's numbers, apart from seed, rate and text, whose digest the line has."""
  found = study.settings(cfg)
  for name in ("path", "text_field"):
    found["data"].pop(name)
  found["data"].get("niah", {}).pop("haystack", None)  # a path too
  found["optim"].pop("end_lr_ratio")  # the last rate is the same at all rates
  return found


def pending(rows: list[base.Row], args: argparse.Namespace, lines: list[lines_lib.Line]):
  """What is still to be run: (row, seed, rate), None for a rate that other runs will tell."""
  for seed in args.seeds:
    for row in rows:
      rates = (row.config.optim.peak_lr,) if args.rates == "1" else row.rates
      have = lines_lib.select(lines, identity(row, args))
      done = {(line["seed"], line["peak_lr"]) for line in have}
      best = lines_lib.best_rate(have, len(rates))
      swept = best is not None and any(all((s, r) in done for r in rates) for s, _ in done)
      every = args.rates != "3"
      if not (swept or every or seed == args.seeds[0]):
        yield row, seed, None
        continue
      sweeps = every or not swept or all((seed, rate) in done for rate in rates)
      yield from ((row, seed, r) for r in (rates if sweeps else (best,)) if (seed, r) not in done)


def identity(row: base.Row, args: argparse.Namespace) -> dict[str, Any]:
  """What a line must agree on to stand for a row."""
  cfg = row.config
  return {
    "labels": row.labels,
    "scale": args.scale,
    "tokens": cfg.steps * cfg.batch_size * cfg.seq_len,
    "corpus_digest": text_of(row).test.header.corpus_digest,
    "score_tokens": args.score_tokens,
    "settings": settings(cfg),
  }


def run(name: str, rows: list[base.Row], args: argparse.Namespace, console) -> None:
  """Runs what is missing; UserError when somebody has asked to stop."""
  path, busy = args.results / f"{name}.jsonl", []
  # Now, for what is committed while the rows run is not what runs.
  origin = {"revision": provenance.revision(*_CODE), "machine": provenance.machine()}
  while todo := list(pending(rows, args, lines_lib.read(path, lines_lib.FIELDS))):
    row, seed, rate = todo[0]
    runs_now = together.first(todo) if args.together else [(seed, rate)]
    words = " ".join(map(str, row.labels.values()))
    console.print(f"{words} {_words(runs_now)}: {len(todo)} runs to go")
    begin = time.perf_counter()
    if args.together:
      found = together.train_and_score(row, runs_now, args.score_tokens)
    else:
      found = [_train_and_score(name, row, seed, rate, args)]
    for line in found:
      add(path, identity(row, args) | line | _about(name, row, line, args) | origin)
    gc.collect()
    jax.clear_caches()
    busy.append((time.perf_counter() - begin) / len(runs_now))
    left = sum(busy) / len(busy) * (len(todo) - len(runs_now))
    eta = f"{left // 3600:.0f}:{left // 60 % 60:02.0f}"
    for line in found:
      score = line["failure"] or f"test perplexity {line['test']['perplexity']:.3f}"
      run_words = _words([(line["seed"], line["peak_lr"])])
      console.print(f"{words} {run_words}: {score}, {busy[-1]:.0f} s, eta of all {eta}")


def _words(runs_now: list[tuple[int, float]]) -> str:
  """Seeds and rates of some runs."""
  seeds, rates = (dict.fromkeys(x) for x in zip(*runs_now))
  return f"seed {' '.join(map(str, seeds))} rate {' '.join(f'{x:g}' for x in rates)}"


def add(path: pathlib.Path, line: lines_lib.Line) -> None:
  """Adds a line in place of those of other settings; other processes may do so meanwhile."""
  where = {k: line[k] for k in ("labels", "scale", "tokens", "corpus_digest")}
  same = {k: line[k] for k in ("settings", "score_tokens")}
  with provenance.sole_writer(path):
    kept = [
      old
      for old in lines_lib.read(path, lines_lib.FIELDS)
      if not where.items() <= old.items() or same.items() <= old.items()
    ]
    provenance.write(path, "".join(json.dumps(x) + "\n" for x in [*kept, line]))


def _train_and_score(
  name: str, row: base.Row, seed: int, rate: float, args: argparse.Namespace
) -> lines_lib.Line:
  """A run's line, but for what `_about` says."""
  cfg = row.config.copy_and_resolve_references()
  cfg.seed, cfg.optim.peak_lr = seed, rate
  cfg.optim.end_lr_ratio = row.config.optim.end_lr_ratio * row.config.optim.peak_lr / rate
  cfg.log.tensorboard = False
  key = hashlib.sha256(json.dumps(identity(row, args), sort_keys=True).encode()).hexdigest()[:8]
  words = re.sub(r"[^\w.]+", "-", "-".join(map(str, row.labels.values())))
  folder = args.workdir / name / f"{args.scale}-{words}-seed{seed}-rate{rate:g}-{key}"
  cfg.workdir = str(folder)
  failure = ""
  try:
    train.run(train.prepare(cfg))
  except NotFiniteError as e:
    failure = str(e).split(" and training has stopped")[0]
  if not failure and checkpoint.latest_step(folder) != cfg.steps:
    raise UserError("stopped; the same command goes on from there")
  timed = [r[_TIME] for r in metrics.read(folder / metrics.JSONL) if _TIME in r]
  return {
    "seed": seed,
    "peak_lr": rate,
    "failure": failure,
    **{s: None if failure else _score(cfg, s, args.score_tokens) for s in lines_lib.SPLITS},
    "scores": {} if failure or name not in SCORES else SCORES[name](cfg, args),
    # By the median, so that a pause of the machine does not count.
    "seconds": round(cfg.steps * statistics.median(timed), 1) if timed else None,
  }


def _about(
  name: str, row: base.Row, line: lines_lib.Line, args: argparse.Namespace
) -> dict[str, Any]:
  """What a line says of its model, its text and how it is made again."""
  cfg, job = row.config, train.prepare(row.config)
  return {
    "steps": cfg.steps,
    "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(job.lm, nnx.Param))),
    "state_floats": job.lm.state_size(),
    "flops": 3 * cfg.steps * cfg.batch_size * job.lm.flops(cfg.seq_len),
    "corpus": pathlib.Path(text_of(row).test.header.corpus).name,
    "tokenizer": runs.tokenizer(job).name,
    "command": _command(name, row, line["seed"], args),
  }


def _score(cfg, split: str, score_tokens: int) -> dict[str, Any]:
  """The numbers of a trained run on a split."""
  job, params = runs.open_run(cfg)
  with jax.set_mesh(job.mesh):
    return lengths.own_scorer(job, split, score_tokens)(params)


def _common_sense(cfg, args: argparse.Namespace) -> dict[str, Any]:
  """Table 1's numbers of a trained run, in its order: LAMBADA's perplexity, percent right."""
  flags = {"tasks": ",".join(table1.TASKS), "data": args.tasks}
  harness.evaluate(cfg, argparse.Namespace(**(harness.FLAGS | flags)))
  report = json.loads((pathlib.Path(cfg.workdir) / harness.FILE).read_text())["tasks"]
  right = {t: 100 * report[t][harness_tasks.TASKS[t].metric] for t in table1.TASKS}
  return {"lambada_perplexity": report["lambada_openai"]["perplexity"], **right}


def _needles(cfg, args: argparse.Namespace) -> dict[str, Any]:
  """Table 3's numbers of a trained run, in its order: percent of the needles that are found."""
  for kind in dict.fromkeys(kind for kind, _ in table3.CELLS):
    lengths = ",".join(str(n) for k, n in table3.CELLS if k == kind)
    flags = {"kinds": kind, "lengths": lengths, "haystack": args.tasks}
    flags["samples"] = str(SAMPLES[args.scale])
    niah.evaluate(cfg, argparse.Namespace(**(niah.FLAGS | flags)))
  lines = runs.Lines(pathlib.Path(cfg.workdir) / niah.FILE)
  score = lambda kind, n: 100 * lines.find({"kind": kind, "length": n})["score"]
  return {f"{kind} {n}": score(kind, n) for kind, n in table3.CELLS}


SCORES = {"table1": _common_sense, "table3": _needles}


def _command(name: str, row: base.Row, seed: int, args: argparse.Namespace) -> str:
  """The command of one row, of the text its name whatever its folder."""
  flags = [f"--scale={args.scale}", *(f"--only={k}={v}" for k, v in row.labels.items())]
  flags += [f"--seeds={seed}"]
  if args.data:
    flags.append(f"--data={pathlib.Path(args.data).name}")
  if args.tasks:
    flags.append(f"--tasks={pathlib.Path(args.tasks).name}")
  if args.tokens:
    flags.append(f"--tokens={args.tokens}")
  if args.score_tokens != SCORE_TOKENS[args.scale]:
    flags.append(f"--score_tokens={args.score_tokens}")
  if args.rates != "3":
    flags.append(f"--rates={args.rates}")
  if args.together:
    flags.append("--together")
  return shlex.join(["python", "-m", "experiments.tables.run", name, *flags])


def _parse(argv: list[str]) -> argparse.Namespace:
  """The flags of a command line; UserError for a mistake in them."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  numbers = lambda text: [int(n) for n in text.split(",")]
  parser.add_argument("table", help="a file of experiments/configs/paper")
  parser.add_argument("--scale", default="mini", help=", ".join(base.SCALES))
  parser.add_argument("--data", default="", help="path of a text")
  parser.add_argument("--seeds", type=numbers, default=[0])
  parser.add_argument("--only", action="append", default=[], help="LABEL=VALUE[,VALUE]")
  parser.add_argument("--tokens", type=int, default=0, help="trained on by every row")
  parser.add_argument("--score_tokens", type=int, help="read of each split; 0 is all")
  parser.add_argument("--rates", choices=("1", "3", "all"), default="3", help="tried of every row")
  parser.add_argument("--tasks", default="", help="path of the tasks' files or the haystack")
  parser.add_argument("--together", action="store_true", help="runs of a row in one program")
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of the lines")
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/tables"))
  args = parser.parse_args(argv[1:])
  base.check(args.scale)
  if args.table in SCORES and not args.tasks:
    raise UserError(f"--tasks is not given, but {args.table} is scored on the files that it names")
  if args.together and args.table in SCORES:
    raise UserError(f"--together is given, but {args.table} is scored on checkpoints")
  if args.table == "table1":
    harness.check_installed()
  if bad := [x for x in args.only if "=" not in x]:
    raise UserError(f"--only={bad[0]} is given; accepted is LABEL=VALUE")
  pairs = (x.split("=", 1) for x in args.only)
  args.only = {label: values.split(",") for label, values in pairs}
  if args.score_tokens is None:
    args.score_tokens = SCORE_TOKENS[args.scale]
  return args


def main(argv: list[str]) -> int:
  """Runs the command line `argv`; 2 for a mistake in what was asked, one sentence on stderr."""
  console = rich.console.Console(highlight=False, markup=False, soft_wrap=True)
  allocator.keep_freed_memory()
  try:
    args = _parse(argv)
    run(args.table, chosen(get(args.table), args), args, console)
  except (ValueError, FileNotFoundError) as e:
    print("error:", " ".join(str(e).split()), file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))

"""Recall through the training path: the linear reading, and the default one at two chunk sizes.

    python -m benchmarks.recall

Trains experiments/configs/mqar.py in every setting below with seeds 0, 1, 2, one process after the
other. Each run that has ended adds a line to benchmarks/results/recall.jsonl and is not run again
unless the mixer's knobs have changed; one that was killed goes on from its checkpoint. The table is
printed and written to recall.md.
"""

import argparse
import hashlib
import json
import pathlib
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import tabulate

from experiments import config, metrics, provenance

ROOT = provenance.ROOT
RESULTS = ROOT / "benchmarks" / "results" / "recall.jsonl"
CONFIG = "experiments/configs/mqar.py"
SETTINGS = {
  "linear phi, C = 1": [f"--config={CONFIG}:linear"],
  "default, C = 1": [f"--config={CONFIG}", "--config.model.trellis.chunk_size=1"],
  "default, C = 16": [f"--config={CONFIG}", "--config.model.trellis.chunk_size=16"],
}
ONSET = 0.5  # accuracy


def jobs(steps: int, seeds: int) -> Iterator[dict[str, Any]]:
  """What tells the runs apart, as in their lines; the first setting's come first."""
  for setting, flags in SETTINGS.items():
    for seed in range(seeds):
      run = [*flags, f"--config.steps={steps}", f"--config.optim.warmup_steps={steps // 10}"]
      run.append(f"--config.seed={seed}")
      knobs = config.parse(["", *run]).model.trellis.to_dict()
      yield {"setting": setting, "seed": seed, "flags": " ".join(run), "knobs": knobs}


def train(job: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
  """Trains one run to its end and returns its line; `failure` is the error's sentence or empty."""
  revision = provenance.revision("trellis_jax", "pallas_kernels", "experiments")
  digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:8]
  words = re.sub(r"\W+", "-", job["setting"])
  folder = workdir / f"{words}-seed{job['seed']}-{digest}"
  flags = [*job["flags"].split(), f"--config.workdir={folder}"]
  command = [sys.executable, "-m", "experiments.main", *flags]
  done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
  if done.returncode not in (0, 1):  # 1: its numbers were no longer finite, which is a result
    raise SystemExit(done.stderr)
  records = metrics.read(folder / metrics.JSONL)
  if not done.returncode and f"--config.steps={records[-1]['step']}" not in flags:
    raise SystemExit(f"stopped at step {records[-1]['step']}; the same command goes on from there")
  failure = done.stderr.strip().splitlines()[-1] if done.returncode else ""
  origin = {"revision": revision, "jax": jax.__version__}
  return {**job, **summary(records), "failure": failure, **origin}


def summary(records: list[dict[str, float]]) -> dict[str, Any]:
  """What a line says of a run's metrics: the last held-out accuracy, its onset and its time.

  The onset is the first logged step whose batch, of examples that no earlier step has seen, is
  answered right in more than half of its queries; None when there is none.
  """
  evaluated = [r["eval/accuracy"] for r in records if "eval/accuracy" in r]
  timed = [r["time/step_seconds"] for r in records if "time/step_seconds" in r]
  return {
    "steps": records[-1]["step"],
    "accuracy": evaluated[-1] if evaluated else None,
    "onset": next((r["step"] for r in records if r["train/accuracy"] > ONSET), None),
    # By the median, so that a pause of the machine does not count.
    "seconds": round(records[-1]["step"] * statistics.median(timed), 1),
  }


def table(lines: list[dict[str, Any]], seeds: int) -> str:
  """One row per setting: accuracy and onset per seed, and what a run takes."""
  rows = []
  for setting in SETTINGS:
    runs = {line["seed"]: line for line in lines if line["setting"] == setting}
    minutes = [line["seconds"] / 60 for line in runs.values()]
    mean = f"{sum(minutes) / len(minutes):.1f}" if minutes else ".."
    rows.append([setting, *(cell(runs.get(seed)) for seed in range(seeds)), mean])
  columns = ["reading", *(f"seed {s}" for s in range(seeds)), "minutes a run"]
  return tabulate.tabulate(rows, columns, tablefmt="github", disable_numparse=True)


def cell(line: dict[str, Any] | None) -> str:
  """ "0.9925 (300)": accuracy and onset, "-" for none; ".." for a run that has not ended."""
  if line is None:
    return ".."
  if line["failure"]:
    return f"not finite, step {line['steps']}"
  return f"{line['accuracy']:.4f} ({line['onset'] or '-'})"


def report(lines: list[dict[str, Any]], steps: int, seeds: int, command: str) -> str:
  """The text of recall.md."""
  revisions = " ".join(sorted({line["revision"] for line in lines})) or "none yet"
  versions = " ".join(sorted({line["jax"] for line in lines})) or "none yet"
  return f"""    {command}

MQAR through the training path: 6 pairs after 20 blank tokens, T = 64, vocabulary 64, M = D = 32,
2 layers, width 64, {steps:,} steps of 32 examples. Accuracy: held-out queries that are answered
right, of 6,144; guessing among an example's six values gives 0.17. In parentheses its onset: the
first logged step whose batch is answered right in more than half of its queries, - for none.
Revisions: {revisions}; jax {versions}.

{table(lines, seeds)}
"""


def main() -> None:
  """Runs what is missing, and writes the table after every run."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument("--steps", type=int, default=2000, help="updates of a run")
  parser.add_argument("--seeds", type=int, default=3, help="seeds of a setting, from 0 on")
  parser.add_argument("--workdir", type=pathlib.Path, default=ROOT / "runs" / "recall")
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a .jsonl file")
  args = parser.parse_args()
  command = " ".join(["python -m benchmarks.recall", *sys.argv[1:]])
  args.results.parent.mkdir(parents=True, exist_ok=True)
  lines = metrics.read(args.results) if args.results.exists() else []
  done = []
  for job in jobs(args.steps, args.seeds):
    line = next((line for line in lines if job.items() <= line.items()), None)
    if line is None:
      line = train(job, args.workdir.absolute())
      lines.append(line)
      provenance.write(args.results, "".join(json.dumps(line) + "\n" for line in lines))
    done.append(line)
    text = report(done, args.steps, args.seeds, command)
    provenance.write(args.results.with_suffix(".md"), text)
  print(text)


if __name__ == "__main__":
  main()

"""Common-sense tasks by lm-evaluation-harness, on local files or on its stock data sets.

    python -m experiments.evals.harness --config=... --tasks=piqa,arc_easy --data=FOLDER

Takes the config of a run on text and restores its newest checkpoint. Flags, besides the run's:

    --tasks=...     names; those of evals/harness_tasks.py when none are given
    --data=FOLDER   holds TASK_SPLIT.jsonl of every task, and nothing is asked of the network;
                    without, the harness fetches its stock data sets, of any task that it has
    --limit=N       the first N examples of each task; 0 is all
    --fewshot=N     examples before each question; 0 is what the task says, mostly none
    --rows=16       texts read at a time
    --context=4096  tokens that attention's caches hold, where a model has some

Prints a table and writes workdir/harness.json. Needs `pip install '.[eval]'`; torch is not needed.
"""

import importlib.util
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import rich.progress
import tabulate

from experiments import provenance
from experiments.errors import UserError
from experiments.evals import harness_tasks, runs
from experiments.evals.scoring import Scorer

FLAGS = {
  "tasks": ",".join(harness_tasks.TASKS),
  "data": "",
  "limit": "0",
  "fewshot": "0",
  "rows": "16",
  "context": "4096",
}
FILE = "harness.json"
SEED = 1234  # of the examples before a question


def check_installed() -> None:
  """Raises UserError, saying how to install it, unless the harness is there."""
  if importlib.util.find_spec("lm_eval") is None:
    raise UserError("lm_eval is not installed; `pip install '.[eval]'` does it")


def run_tasks(
  model: Any, names: Sequence[str], folder: pathlib.Path | None, *, limit: int, fewshot: int
) -> dict[str, dict[str, Any]]:
  """The harness's results of each task.

  Args:
    model: a HarnessLM, or any other of the harness.
    names: of the tasks.
    folder: their local files; None for the stock data sets.
    limit: the first so many examples of each; 0 is all.
    fewshot: examples before each question; 0 is what the task says.

  Returns:
    By task: its metrics and their standard errors as the harness names them, and `examples`.

  Raises:
    UserError: a task is unknown, or a file is bad.
  """
  check_installed()
  os.environ["DISABLE_MULTIPROC"] = "1"  # of the harness: JAX's threads do not survive a fork
  if folder is not None:
    _check_local(names, folder)
    # Read when the harness is imported: nothing must be asked of a network.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
  from lm_eval import evaluator
  from lm_eval.tasks import TaskManager

  with tempfile.TemporaryDirectory() as out:
    if folder is None:
      manager = TaskManager()
      if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(f"task {unknown[0]!r} is unknown to the harness that is installed")
    else:
      for name in names:
        harness_tasks.write(name, folder, pathlib.Path(out))
      manager = TaskManager(include_path=out, include_defaults=False)
    found = evaluator.simple_evaluate(
      model,
      tasks=list(names),
      num_fewshot=fewshot or None,
      limit=limit or None,
      task_manager=manager,
      bootstrap_iters=1000,
      log_samples=False,
      random_seed=SEED,
      numpy_random_seed=SEED,
      fewshot_random_seed=SEED,
    )
  results = {}
  for name in names:
    metrics = {
      key.replace(",none", ""): value
      for key, value in found["results"][name].items()
      if isinstance(value, int | float)
    }
    results[name] = metrics | {"examples": found["n-samples"][name]["effective"]}
  return results


def _check_local(names: Sequence[str], folder: pathlib.Path) -> None:
  if unknown := [name for name in names if name not in harness_tasks.TASKS]:
    accepted = ", ".join(harness_tasks.TASKS)
    raise UserError(f"task {unknown[0]!r} is unknown; accepted with --data are {accepted}")
  if not folder.is_dir():
    raise UserError(f"--data={folder} is given, but there is no such folder")
  for name in names:
    harness_tasks.check_file(name, folder)


def table(results: dict[str, dict[str, Any]]) -> str:
  """A line for each task with the metric that papers report, and their average."""
  rows, scores = [], []
  for name, result in results.items():
    metric = harness_tasks.TASKS[name].metric if name in harness_tasks.TASKS else "acc"
    if (score := result.get(metric)) is not None:
      scores.append(100 * score)
      error = result.get(f"{metric}_stderr")
      rows.append([name, metric, result["examples"], scores[-1], error and 100 * error])
    if (perplexity := result.get("perplexity")) is not None:
      rows.append([name, "perplexity", result["examples"], perplexity, None])
  if len(scores) > 1:
    rows.append(["average", "", None, sum(scores) / len(scores), None])
  return tabulate.tabulate(rows, ["task", "metric", "examples", "value", "+-"], floatfmt=".2f")


def evaluate(cfg, given) -> None:
  """Prints and writes the results of a run."""
  check_installed()
  names = [name.strip() for name in given.tasks.split(",")]
  folder = pathlib.Path(given.data).expanduser() if given.data else None
  if folder is not None:
    _check_local(names, folder)
  limit, fewshot = runs.integer(given, "limit"), runs.integer(given, "fewshot")
  rows, context = runs.integer(given, "rows", 1), runs.integer(given, "context")
  job, params = runs.open_run(cfg)
  tokenizer = runs.tokenizer(job)
  from experiments.evals.harness_lm import HarnessLM

  with jax.set_mesh(job.mesh):
    track = lambda batches: rich.progress.track(batches, "scoring", transient=True)
    scorer = Scorer(runs.model(job, params, context), tokenizer.bos_id, rows=rows, track=track)
    model = HarnessLM(scorer, tokenizer)
    results = run_tasks(model, names, folder, limit=limit, fewshot=fewshot)
  about = {"step": job.start, "limit": limit, "fewshot": fewshot, "tokenizer": tokenizer.name}
  about["revision"] = provenance.revision("experiments", "trellis_jax", "pallas_kernels")
  report = json.dumps(about | {"tasks": results}, indent=2)
  provenance.write(job.workdir / FILE, report + "\n")
  print(table(results))


def main(argv: list[str]) -> int:
  """Runs the command line `argv` and returns its exit code."""
  return runs.command(argv, __doc__, FLAGS, evaluate)


if __name__ == "__main__":
  sys.exit(main(sys.argv))

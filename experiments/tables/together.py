"""A row's runs in one program: every seed with every rate, side by side (experiments/replicas.py).

A model of the small scales leaves an accelerator idle, and compiling it takes longer than training
it. What a run computes is the same as alone, to rounding. Nothing is saved before all have ended.
"""

import math

import jax

from experiments import replicas, train
from experiments.configs.paper import base
from experiments.evals import lengths
from experiments.tables import lines as lines_lib


def first(todo: list[tuple[base.Row, int, float | None]]) -> list[tuple[int, float]]:
  """(seed, rate) of the runs that can start with the first one: its row's, with its seed's rates.

  A rate is None where other runs will tell it; the first is not.
  """
  row, seed, _ = todo[0]
  by_seed: dict[int, list[float]] = {}
  for other, s, rate in todo:
    if other.labels == row.labels and rate is not None:
      by_seed.setdefault(s, []).append(rate)
  return [(s, r) for s, rates in by_seed.items() if rates == by_seed[seed] for r in rates]


def train_and_score(
  row: base.Row, runs_now: list[tuple[int, float]], score_tokens: int
) -> list[lines_lib.Line]:
  """The lines of some runs, of which they say the scores alone.

  Args:
    row: what is run.
    runs_now: (seed, rate) of every pair of some seeds and rates, as `first` gives them.
    score_tokens: read of each split, 0 for all.
  """
  seeds, rates = (list(dict.fromkeys(x)) for x in zip(*runs_now))
  cfg = row.config.copy_and_resolve_references()
  end_lr = cfg.optim.peak_lr * cfg.optim.end_lr_ratio
  cfg.eval.every = 0
  trained = []
  done = replicas.train(cfg, seeds, rates, end_lr=end_lr, on_end=trained.append)
  job = train.prepare(cfg)
  with jax.set_mesh(job.mesh):
    scorers = {s: lengths.own_scorer(job, s, score_tokens) for s in lines_lib.SPLITS}
    found = []
    for i, replica in enumerate(done):
      at = divmod(i, len(rates))
      params = jax.tree.map(lambda x, at=at: x[at], trained[0])
      line = {"seed": replica.seed, "peak_lr": replica.peak_lr, "failure": _failure(replica)}
      score = lambda f, line=line, params=params: None if line["failure"] else f(params)
      line |= {split: score(f) for split, f in scorers.items()}
      found.append(line | {"scores": {}, "seconds": None})
  return found


def _failure(replica: replicas.Replica) -> str:
  """Why a replica has no numbers, "" where it has."""
  if replica.lost is None:
    return ""
  loss, norm = replica.train_loss[-1], replica.grad_norm[-1]
  what = f"loss is {loss}" if not math.isfinite(loss) else f"grad_norm is {norm}"
  return f"{what} at step {replica.lost}"

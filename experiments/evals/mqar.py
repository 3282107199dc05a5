"""Accuracy of recall by setting: the share of queries whose value has the largest logit of all.

    python -m experiments.evals.mqar --config=experiments/configs/mqar.py --settings=64x4,128x8

Takes the config of a run on data.task mqar or mqar_mix, restores its newest checkpoint, and asks
examples of the test split in each of the settings LENGTHxPAIRS, which are those of the run when
none are given. `--examples` is their number for each, `--blanks` and `--noise` (true or false) are
the run's unless given. Prints a table and writes it to workdir/mqar.json.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tabulate
from flax import nnx
from jaxtyping import Array, Int

from experiments import data, provenance, tasks
from experiments.errors import UserError
from experiments.evals import runs
from experiments.tasks import mqar, mqar_mix

FLAGS = {"settings": "", "examples": "0", "blanks": "", "noise": ""}
TASKS = ("mqar", "mqar_mix")


@dataclasses.dataclass(frozen=True)
class Setting:
  """Examples of `seq_len` tokens each; the train split's number is of no use here."""

  seq_len: int
  task: mqar.Config

  @property
  def name(self) -> str:
    return f"{self.seq_len}x{self.task.pairs}"


class Evaluator:
  """Accuracy on the test split of each setting, every query of it, pooled."""

  def __init__(self, graphdef: nnx.GraphDef, settings: Sequence[Setting], tokens_per_batch: int):
    """Args: the model, what to ask, and about how many tokens to read at a time."""
    self.settings, self.tokens_per_batch = settings, tokens_per_batch

    def answers(params, tokens, segment_ids, at) -> Int[Array, "B K"]:
      lm = nnx.merge(graphdef, params)
      hidden, _ = lm.hidden(tokens, segment_ids=segment_ids)
      hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
      kernel = lm.head_kernel()
      logits = jnp.einsum("bkw,wv->bkv", hidden, kernel, preferred_element_type=jnp.float32)
      return jnp.argmax(logits, axis=-1)

    self.answers = jax.jit(answers)

  def run(self, params: Any) -> Iterator[tuple[str, float]]:
    """Yields ("accuracy/LENGTHxPAIRS", share of the queries that are answered right)."""
    for setting in self.settings:
      split = tasks.Split("mqar", setting.task, "test")
      size = max(1, self.tokens_per_batch // setting.seq_len)
      size = min(size, setting.task.held_out_examples)
      batches = data.loader(
        split, seq_len=setting.seq_len, batch_size=size, shuffle=False, repeat=False
      )
      right = asked = 0
      for batch in batches:
        # Padding asks nothing; its positions are those of the first token, and are not counted.
        counted = np.sort(-batch["weights"], axis=1)[:, : setting.task.pairs] < 0
        at = np.argsort(-batch["weights"], axis=1, kind="stable")[:, : setting.task.pairs]
        found = self.answers(params, batch["tokens"], batch["segment_ids"], at)
        wanted = np.take_along_axis(batch["targets"], at, axis=1)
        right += int((np.asarray(found) == wanted)[counted].sum())
        asked += int(counted.sum())
      yield f"accuracy/{setting.name}", right / asked


def settings_of(cfg, given) -> list[Setting]:
  """The settings that a run's config and the command's flags ask for."""
  task = cfg.data.task
  if task not in TASKS:
    raise UserError(f"config.data.task = {task!r} is given; accepted are {', '.join(TASKS)}")
  whole = tasks.load(cfg.data).config
  parts = whole.parts() if task == "mqar_mix" else [(cfg.seq_len, whole)]
  if given.settings:
    parts = [
      (length, dataclasses.replace(parts[0][1], pairs=pairs))
      for length, pairs, _ in mqar_mix.parse(given.settings)
    ]
  changes: dict[str, Any] = {}
  if examples := runs.integer(given, "examples"):
    changes["held_out_examples"] = examples
  if given.blanks:
    changes["blanks"] = runs.integer(given, "blanks")
  if given.noise:
    if given.noise not in ("true", "false"):
      raise UserError(f"--noise={given.noise} is given; accepted are true, false")
    changes["noise"] = given.noise == "true"
  settings = [Setting(length, dataclasses.replace(part, **changes)) for length, part in parts]
  for setting in settings:
    mqar.slots(setting.seq_len, setting.task.blanks, setting.task.pairs)
  return settings


def evaluate(cfg, given) -> None:
  """Prints and writes the accuracies of a run."""
  settings = settings_of(cfg, given)
  job, params = runs.open_run(cfg)
  graphdef, _ = nnx.split(job.lm, nnx.Param)
  with jax.set_mesh(job.mesh):
    found = dict(Evaluator(graphdef, settings, cfg.batch_size * cfg.seq_len).run(params))
  rows = [
    {
      "seq_len": s.seq_len,
      "accuracy": found[f"accuracy/{s.name}"],
      "examples": s.task.held_out_examples,
      **{k: getattr(s.task, k) for k in ("pairs", "blanks", "noise", "power", "vocab_size")},
    }
    for s in settings
  ]
  print(tabulate.tabulate(rows, headers="keys", floatfmt=".4f"))
  report = {"step": job.start, "floats_of_state": job.lm.state_size(), "settings": rows}
  provenance.write(job.workdir / "mqar.json", json.dumps(report, indent=2) + "\n")


def main(argv: list[str]) -> int:
  """Runs the command line `argv` and returns its exit code."""
  return runs.command(argv, __doc__, FLAGS, evaluate)


if __name__ == "__main__":
  sys.exit(main(sys.argv))

"""A trained run, opened for an evaluation."""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
from flax import nnx

from experiments import checkpoint, config, metrics, provenance, tokenise, train
from experiments.errors import UserError
from trellis_jax import LM, mixers


def open_run(cfg: ml_collections.ConfigDict) -> tuple[train.Job, Any]:
  """The run of a config and the parameters of its newest checkpoint, on this machine's mesh.

  Raises:
    ValueError: there is no checkpoint, or another run's, or the config or the data are bad.
  """
  config.check(cfg)
  if cfg.distributed.enabled:
    raise UserError("config.distributed.enabled = True is given, but an evaluation is one process")
  if checkpoint.latest_step(pathlib.Path(cfg.workdir).expanduser()) is None:
    raise UserError(
      f"{cfg.workdir} holds no checkpoint; `python -m experiments.main` with the same flags trains"
    )
  job = train.prepare(cfg)
  abstract = train.build(job).abstract.params
  return job, checkpoint.restore(job.workdir, job.start, params=abstract)["params"]


def model(job: train.Job, params: Any, context: int = 0) -> LM:
  """The run's model with these parameters; attention's caches hold at least `context` tokens."""
  cfg, knobs = job.lm.cfg, {}
  for name in cfg.pattern:
    knobs[name] = dict(cfg.mixers.get(name, {}))
    held = getattr(mixers.configure(name, knobs[name]), "cache_length", None)
    if held is not None:
      knobs[name]["cache_length"] = max(held, context)
  cfg = dataclasses.replace(cfg, mixers=knobs)
  lm = nnx.eval_shape(lambda: LM(cfg, rngs=nnx.Rngs(0)))
  return nnx.merge(nnx.split(lm, nnx.Param)[0], params)


def tokenizer(job: train.Job) -> tokenise.Tokenizer:
  """The tokenizer of a run; UserError for a task that has none."""
  found = getattr(job.dataset, "tokenizer", None) or getattr(job.dataset.config, "loaded", None)
  if found is None:
    raise UserError(f"config.data.task = {job.cfg.data.task!r} has no tokenizer, so no text")
  return found


def command(
  argv: Sequence[str],
  doc: str,
  defaults: Mapping[str, str],
  evaluate: Callable[[ml_collections.ConfigDict, argparse.Namespace], None],
) -> int:
  """Runs `evaluate(config, flags)` for a command line of --NAME=VALUE and config flags.

  Args:
    argv: the command line, its program first.
    doc: what --help prints.
    defaults: the flags besides the config's, and their values when not given.
    evaluate: may raise ValueError or FileNotFoundError for a mistake of the caller.

  Returns:
    The exit code: 2 for a mistake, which is one sentence on stderr.
  """
  if {"--help", "-h"} & set(argv):
    print(doc)
    return 0
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  for name, value in defaults.items():
    parser.add_argument(f"--{name}", default=value, nargs="?", const="")
  given, rest = parser.parse_known_args(list(argv))
  try:
    evaluate(config.parse(rest), given)
  except (ValueError, FileNotFoundError) as e:
    print("error:", " ".join(str(e).split()), file=sys.stderr)
    return 2
  return 0


def integer(given: argparse.Namespace, name: str, least: int = 0) -> int:
  """A flag's value, an integer of at least `least`."""
  text = getattr(given, name)
  if not text.isdecimal() or int(text) < least:
    raise UserError(f"--{name}={text} is given, but it must be an integer >= {least}")
  return int(text)


def integers(given: argparse.Namespace, name: str, least: int = 1) -> list[int]:
  """A flag's values, integers of at least `least` separated by commas."""
  texts = [text.strip() for text in getattr(given, name).split(",")]
  if bad := [text for text in texts if not text.isdecimal() or int(text) < least]:
    raise UserError(f"--{name}: {bad[0]!r} is given, but it must be an integer >= {least}")
  return [int(text) for text in texts]


class Lines:
  """Results of an evaluation, a line of JSON for each of its cells, written as they end."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.lines = metrics.read(path) if path.exists() else []

  def find(self, cell: Mapping[str, Any]) -> dict[str, Any] | None:
    """The line that says all that a cell says, None when it was not run."""
    return next((line for line in self.lines if cell.items() <= line.items()), None)

  def add(self, cell: Mapping[str, Any], **found: Any) -> None:
    """Writes a cell's line, with the revision that made it."""
    about = {"revision": provenance.revision("experiments", "trellis_jax", "pallas_kernels")}
    self.lines.append({**cell, **found, **about})
    provenance.write(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

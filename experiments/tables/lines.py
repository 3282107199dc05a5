"""The lines of finished runs: read with care, grouped, and the best rate of each row."""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.errors import UserError

Line = dict[str, Any]
SPLITS = ("validation", "test")  # that a run is read on: the first chooses its rate
# What every line of a language model's row says.
FIELDS = (
  *("labels", "scale", "seed", "peak_lr", "failure", "validation", "test"),
  *("tokens", "parameters", "state_floats", "flops", "corpus", "corpus_digest"),
  *("revision", "command", "seconds"),
)


def read(path: pathlib.Path, fields: Iterable[str] = ()) -> list[Line]:
  """The lines of a file, none when it is absent.

  Raises:
    UserError: a line is cut, is no JSON object, or lacks a field.
  """
  if not path.exists():
    return []
  found = []
  for number, text in enumerate(path.read_text().splitlines(keepends=True), 1):
    where = f"{path.name}:{number}"
    try:
      line = json.loads(text)
    except ValueError:
      raise UserError(f"{where} is cut off or no JSON; delete the line, or run it again") from None
    if not isinstance(line, dict):
      raise UserError(f"{where} is {type(line).__name__}, but a line must be an object")
    if missing := [name for name in fields if name not in line]:
      raise UserError(f"{where} has no field {missing[0]!r}; a line has {', '.join(fields)}")
    found.append(line)
  return found


def select(lines: Iterable[Line], wanted: Mapping[str, Any]) -> list[Line]:
  """The lines that say all of this."""
  return [line for line in lines if wanted.items() <= line.items()]


def loss(line: Line) -> float:
  """A line's validation loss in nats per token, infinite for a run that failed."""
  if line["failure"]:
    return math.inf
  return line["validation"]["nats"] / line["validation"]["tokens"]


def best_rate(lines: Iterable[Line], least: int = 1) -> float | None:
  """The learning rate with the least validation loss, the mean over the seeds with the most rates.

  None unless those have `least` rates. Of seeds whose rates differ, the first has its say.
  """
  by_seed: dict[int, dict[float, float]] = {}
  for line in lines:
    by_seed.setdefault(line["seed"], {})[line["peak_lr"]] = loss(line)
  rates = max((by_seed[seed].keys() for seed in sorted(by_seed)), key=len, default=())
  swept = [losses for losses in by_seed.values() if losses.keys() == set(rates)]
  mean = lambda rate: sum(losses[rate] for losses in swept) / len(swept)
  return min(rates, key=mean) if rates and len(rates) >= least else None


def best(lines: Iterable[Line]) -> list[Line]:
  """The lines at the best rate, by seed."""
  lines = list(lines)
  rate = best_rate(lines)
  return sorted((x for x in lines if x["peak_lr"] == rate), key=lambda x: x["seed"])

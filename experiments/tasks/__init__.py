"""Synthetic tasks in the place of text: a name is a file of this folder.

A task's file holds `Config`, a frozen dataclass of its knobs with `vocab_size` among them, and
`Rows(config, split, seq_len)`: a split's examples by their number, each a dict of [T] arrays as
data.loader describes them, `len()` of them, and `blank()`, a row of padding; `in_order` where they
may not be shuffled. `NAME_check.py` says whether examples, ours or others', follow the protocol of
NAME.
"""

import dataclasses
import importlib
import pathlib
from typing import Any

import numpy as np

from experiments import tokenise
from experiments.corpus import SPLITS
from experiments.errors import UserError


def names() -> list[str]:
  """The tasks there are."""
  folder = pathlib.Path(__file__).parent
  stems = {path.stem for path in folder.glob("*.py")} - {"__init__"}
  return sorted(stem for stem in stems if not stem.endswith("_check"))


def get(name: str):
  """The module of a task; UserError for an unknown name lists the folder."""
  if name not in names():
    raise UserError(f"data.task={name!r} is unknown; accepted are '' (text), {', '.join(names())}")
  return importlib.import_module(f"{__name__}.{name}")


@dataclasses.dataclass(frozen=True)
class Split:
  """One split of a task, in the place of a token file."""

  task: str
  config: Any
  name: str

  def rows(self, seq_len: int, packing: str = "documents", align: int = 0):
    """The examples of length `seq_len`; one fills its row, so there is nothing to pack or align."""
    del packing, align
    return get(self.task).Rows(self.config, self.name, seq_len)


@dataclasses.dataclass(frozen=True)
class TaskDataset:
  """The splits of a task, in the place of a data.Dataset; there is no tokenizer, nor any file."""

  task: str
  config: Any

  @property
  def train(self) -> Split:
    return Split(self.task, self.config, "train")

  @property
  def validation(self) -> Split:
    return Split(self.task, self.config, "validation")

  @property
  def test(self) -> Split:
    return Split(self.task, self.config, "test")

  @property
  def splits(self) -> dict[str, Split]:
    """The three splits by name."""
    return {split: getattr(self, split) for split in SPLITS}

  @property
  def vocab_size(self) -> int:
    return self.config.vocab_size

  @property
  def token_bytes(self) -> np.ndarray:
    """Bytes of each token: none."""
    return np.zeros(self.vocab_size, np.int32)

  @property
  def identity(self) -> dict[str, str]:
    """What a checkpoint must agree on besides the config, which holds the task's knobs."""
    found = getattr(self.config, "loaded", None)  # a tokenizer, of a file or trained on samples
    return {"corpus": self.task} | ({"tokenizer": tokenise.digest(found)} if found else {})


def load(config) -> TaskDataset:
  """The task that a config's data section names; UserError says what of it does not fit."""
  task = get(config.task)
  return TaskDataset(config.task, task.Config(**config[config.task]))

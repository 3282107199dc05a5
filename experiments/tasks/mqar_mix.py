"""Recall of several lengths and numbers of pairs in one run, as Zoology and "Based" train it.

The knob `settings` lists them, each LENGTHxPAIRS*EXAMPLES, such as "Based"'s

    64x4*100000, 128x8*20000, 256x16*20000, 256x32*20000, 256x64*20000

An example of L tokens is one of experiments/tasks/mqar.py. A row of T tokens holds T // L examples
of one setting, each a segment of its own, so that nothing is seen across them; the rest is padding.
Rows of the settings take turns in proportion to their numbers. A length that is a multiple of the
mixer's chunk starts every example on a chunk boundary.
"""

import dataclasses
import re

import numpy as np

from experiments.errors import UserError
from experiments.tasks import mqar


@dataclasses.dataclass(frozen=True)
class Config:
  """The knobs of the task; those of one setting are explained in experiments/tasks/mqar.py.

  Attributes:
    settings: LENGTHxPAIRS*EXAMPLES, separated by commas; EXAMPLES are those of the train split.
    held_out_examples: of each setting in the validation split, and in the test split.
  """

  vocab_size: int
  settings: str
  blanks: int
  noise: bool
  power: float
  held_out_examples: int
  seed: int

  def __post_init__(self):
    """Raises UserError for the first knob that does not fit."""
    if not 0 <= self.seed < 1 << 32:
      raise UserError(f"data.mqar_mix.seed={self.seed}; accepted is from 0 to 2**32 - 1")
    self.parts()

  def parts(self) -> list[tuple[int, mqar.Config]]:
    """(L, the task of that setting) of each setting; each draws examples of its own."""
    knobs = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    settings = parse(knobs.pop("settings"))
    result = []
    for number, (seq_len, pairs, examples) in enumerate(settings):
      knobs["seed"] = (number << 32) + self.seed
      part = mqar.Config(pairs=pairs, train_examples=examples, **knobs)
      mqar.slots(seq_len, part.blanks, pairs)
      result.append((seq_len, part))
    return result


def parse(settings: str) -> list[tuple[int, int, int]]:
  """(L, K, examples) of each setting of "64x4*1000, 128x8*500"; one that names none has 1."""
  found = []
  for setting in settings.split(","):
    match = re.fullmatch(r"(\d+)x(\d+)(?:\*(\d+))?", setting.strip())
    if not match:
      raise UserError(f"setting {setting.strip()!r}; accepted is LENGTHxPAIRS*EXAMPLES, 64x4*1000")
    found.append((int(match[1]), int(match[2]), int(match[3] or 1)))
  return found


class Rows:
  """Random access to a split's rows of T tokens."""

  def __init__(self, config: Config, split: str, seq_len: int):
    """Raises UserError when an example does not fit into `seq_len`."""
    self.seq_len = seq_len
    self.parts, turns = [], []
    for number, (length, part) in enumerate(config.parts()):
      if length > seq_len:
        raise UserError(
          f"seq_len={seq_len} is too short for examples of {length} tokens in"
          f" data.mqar_mix.settings; accepted is at least {length}"
        )
      rows = mqar.Rows(part, split, length)
      self.parts.append(rows)
      count = -(-len(rows) // (seq_len // length))
      turns += [((i + 0.5) / count, number, i) for i in range(count)]
    self.order = np.array([turn[1:] for turn in sorted(turns)], np.int32)

  def __len__(self) -> int:
    return len(self.order)

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    number, index = self.order[row]
    part, result = self.parts[number], self.blank()
    fit = self.seq_len // part.seq_len
    for i, example in enumerate(range(index * fit, min((index + 1) * fit, len(part)))):
      at = slice(i * part.seq_len, (i + 1) * part.seq_len)
      for name, values in part[example].items():
        result[name][at] = values
      result["segment_ids"][at] = i + 1
    return result

  def blank(self) -> dict[str, np.ndarray]:
    """A row of padding."""
    return mqar.blank(self.seq_len)

"""Overwriting and forgetting: keys are bound, some bound again, and asked for after a gap.

An example of length T, with K pairs of which R are bound again, and a gap of G tokens:

    k1 v1 ... kK vK   k4 w4 ... k2 w2   .. .. ..   k3 0 k1 0 k4 0 ...   0 ...
    2K                2R                G          2K

The target of a query is the value that its key was bound to last: w4 for k4, v3 for k3. So R = K
asks whether a memory overwrites, R = 0 and a long gap whether it keeps, and 0 < R < K whether it
does the one without losing the other. Keys and values are distinct tokens as in tasks/mqar.py, and
with `noise` random tokens take the place of the blank ones. Which keys are bound again is uniform,
and all orders are. Row i is drawn by a generator of its own, seeded by (seed, split, i).
"""

import dataclasses

import numpy as np

from experiments.corpus import SPLITS
from experiments.errors import UserError, at_least
from experiments.tasks import mqar


@dataclasses.dataclass(frozen=True)
class Config:
  """The knobs of the task.

  Attributes:
    vocab_size: V, tokens; the lower half are keys, the upper half values.
    pairs: K, keys of an example, each asked for once.
    rebound: R, of them that are bound a second time.
    gap: G, tokens between the last pair and the first query.
    noise: whether uniform random tokens take the place of the blank ones, between queries too.
    train_examples: rows of the train split.
    held_out_examples: rows of the validation split, and of the test split.
    seed: of all examples.
  """

  vocab_size: int
  pairs: int
  rebound: int
  gap: int
  noise: bool
  train_examples: int
  held_out_examples: int
  seed: int

  def __post_init__(self):
    """Raises UserError for the first knob that does not fit."""
    at_least(1, "data.rebind", self, "pairs", "train_examples", "held_out_examples")
    at_least(0, "data.rebind", self, "gap", "seed")
    if not 0 <= self.rebound <= self.pairs:
      raise UserError(
        f"data.rebind.rebound={self.rebound}; accepted is from 0 to data.rebind.pairs={self.pairs}"
      )
    least = 2 * max(self.pairs + self.rebound, self.pairs + 1)
    if self.vocab_size < least:
      raise UserError(
        f"data.rebind.vocab_size={self.vocab_size} is too small for {self.pairs} keys and"
        f" {self.pairs + self.rebound} values; accepted is at least {least}"
      )

  @property
  def length(self) -> int:
    """Tokens of an example without what follows its queries."""
    return 4 * self.pairs + 2 * self.rebound + self.gap


class Rows:
  """Random access to a split's examples of T tokens."""

  def __init__(self, config: Config, split: str, seq_len: int):
    """Raises UserError when an example does not fit into `seq_len`."""
    if seq_len < config.length:
      raise UserError(
        f"seq_len={seq_len} is too short for data.rebind; accepted is at least {config.length}"
      )
    self.config, self.seq_len, self.split = config, seq_len, SPLITS.index(split)
    self.length = config.train_examples if split == "train" else config.held_out_examples

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    c = self.config
    rng = np.random.default_rng([c.seed, self.split, row])
    half = c.vocab_size // 2
    keys = 1 + rng.choice(half - 1, c.pairs, replace=False)
    values = half + rng.choice(c.vocab_size - half, c.pairs + c.rebound, replace=False)
    again, asked = rng.choice(c.pairs, c.rebound, replace=False), rng.permutation(c.pairs)
    bound, last = np.concatenate([np.arange(c.pairs), again]), values[: c.pairs].copy()
    last[again] = values[c.pairs :]
    result = self.blank()
    if c.noise:
      result["tokens"][:] = rng.integers(c.vocab_size, size=self.seq_len)
    end = 2 * len(bound)
    queries = end + c.gap + 2 * np.arange(c.pairs)
    result["tokens"][0:end:2], result["tokens"][1:end:2] = keys[bound], values
    result["tokens"][queries], result["targets"][queries] = keys[asked], last[asked]
    result["weights"][queries] = 1
    result["segment_ids"][:] = 1
    return result

  def blank(self) -> dict[str, np.ndarray]:
    """A row of padding."""
    return mqar.blank(self.seq_len)

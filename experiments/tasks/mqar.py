"""Multi-query associative recall (Arora et al. 2023, "Zoology"): key-value pairs, then queries.

An example of length T, with K pairs after B blank tokens:

    0 ... 0  k1 v1 ... kK vK  .. .. k3 0 .. .. k1 0 ...
    B        2K               (T - B - 2K) / 2 slots of two tokens, K of them with a query

The K keys are distinct tokens of 1 .. V/2 - 1, the K values distinct ones of V/2 .. V - 1, and 0 is
blank. K distinct slots are drawn without replacement with weights i^(a - 1), i = 1 ... from the
pairs on, so most queries follow soon; the j-th drawn slot begins with key j. Only a query's
position counts, and its target is the key's value. Zoology's protocol has B = 0: then all pairs lie
in the first chunk, which flatters a model that is stale inside chunks.

Row i is drawn by a generator of its own, seeded by (seed, split, i).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from experiments.corpus import SPLITS
from experiments.errors import UserError, at_least

BLANK = 0


@dataclasses.dataclass(frozen=True)
class Config:
  """The knobs of the task.

  Attributes:
    vocab_size: V, tokens; the lower half are keys, the upper half values.
    pairs: K, key-value pairs in an example, each of which is asked for once.
    blanks: B, tokens before the first pair.
    noise: whether uniform random tokens take the place of the blank ones, between queries too.
    power: a of the law above, from 0 to 1; 1 is uniform.
    train_examples: rows of the train split.
    held_out_examples: rows of the validation split, and of the test split.
    seed: of all examples.
  """

  vocab_size: int
  pairs: int
  blanks: int
  noise: bool
  power: float
  train_examples: int
  held_out_examples: int
  seed: int

  def __post_init__(self):
    """Raises UserError for the first knob that does not fit."""
    at_least(1, "data.mqar", self, "pairs", "train_examples", "held_out_examples")
    at_least(0, "data.mqar", self, "blanks", "seed")
    if not 0 <= self.power <= 1:
      raise UserError(f"data.mqar.power={self.power}; accepted is from 0 to 1")
    if self.vocab_size < 2 * self.pairs + 2:
      raise UserError(
        f"data.mqar.vocab_size={self.vocab_size} is too small for data.mqar.pairs={self.pairs};"
        f" accepted is at least {2 * self.pairs + 2}"
      )


def slots(seq_len: int, blanks: int, pairs: int) -> int:
  """Slots of an example of `seq_len` tokens; UserError when pairs and queries do not fit in."""
  left = seq_len - blanks
  if left % 2:
    raise UserError(
      f"seq_len={seq_len} leaves an odd {left} tokens after data.mqar.blanks={blanks};"
      " accepted is an even number"
    )
  if left < 4 * pairs:
    raise UserError(
      f"seq_len={seq_len} is too short for data.mqar.blanks={blanks} and"
      f" data.mqar.pairs={pairs}; accepted is at least {blanks + 4 * pairs}"
    )
  return left // 2 - pairs


def law(slots: int, power: float) -> Float[np.ndarray, " S"]:
  """The chance of each slot to be the first one drawn."""
  weights = np.arange(1, slots + 1, dtype=np.float64) ** (power - 1)
  return weights / weights.sum()


def lay(
  tokens: Int[np.ndarray, " T"],
  keys: Int[np.ndarray, " K"],
  values: Int[np.ndarray, " K"],
  drawn: Int[np.ndarray, " K"],
  blanks: int = 0,
) -> Int[np.ndarray, " K"]:
  """Writes pairs and queries over `tokens`; returns the queries' positions, of key j the j-th."""
  end = blanks + 2 * len(keys)
  at = end + 2 * drawn
  tokens[blanks:end:2], tokens[blanks + 1 : end : 2] = keys, values
  tokens[at] = keys
  return at


class Rows:
  """Random access to a split's examples of T tokens."""

  def __init__(self, config: Config, split: str, seq_len: int):
    """Raises UserError when the pairs and their queries do not fit into `seq_len`."""
    c = config
    self.law = law(slots(seq_len, c.blanks, c.pairs), c.power)
    self.config, self.seq_len = c, seq_len
    self.split = SPLITS.index(split)
    self.length = c.train_examples if split == "train" else c.held_out_examples

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    c = self.config
    rng = np.random.default_rng([c.seed, self.split, row])
    half = c.vocab_size // 2
    keys = 1 + rng.choice(half - 1, c.pairs, replace=False)
    values = half + rng.choice(c.vocab_size - half, c.pairs, replace=False)
    drawn = rng.choice(len(self.law), c.pairs, replace=False, p=self.law)
    result = self.blank()
    if c.noise:
      result["tokens"][:] = rng.integers(c.vocab_size, size=self.seq_len)
    queries = lay(result["tokens"], keys, values, drawn, c.blanks)
    result["targets"][queries] = values
    result["weights"][queries] = 1
    result["segment_ids"][:] = 1
    return result

  def blank(self) -> dict[str, np.ndarray]:
    """A row of padding."""
    return blank(self.seq_len)


def blank(seq_len: int) -> dict[str, np.ndarray]:
  """A row of padding."""
  return {
    "tokens": np.full(seq_len, BLANK, np.int32),
    "targets": np.full(seq_len, BLANK, np.int32),
    "segment_ids": np.zeros(seq_len, np.int32),
    "weights": np.zeros(seq_len, np.float32),
  }

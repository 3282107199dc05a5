"""Needles in haystacks to train on: rows of samples (experiments/haystacks.py) and their answers.

A row is filled with samples, each a segment of its own. The first has a length drawn evenly on a
logarithmic scale, the others are mostly short; the shortest are a needle, few words and the prefix,
without the question. Copying is learned over a few tokens, and then over more and more: so the
longest samples may grow from row to row. It is learned sooner where numbers are few tokens, which
is what a BPE of the samples makes of them; a text's own may have none for digits. A haystack begins
at a random word, for were it always the first, as in what is scored, a model would learn that text
by heart.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

import numpy as np

from experiments import corpus, essays, haystacks, needles, tokenise
from experiments.errors import UserError, at_least

ANSWER_BYTES = 36  # of a uuid
BPE_ROWS, BPE_ROW = 64, 1 << 14  # that a BPE is trained on, and the bytes of each


@dataclasses.dataclass(frozen=True)
class Config:
  """The knobs of the task.

  Attributes:
    kinds: names of needles.KINDS, separated by commas; the samples take turns. Where they grow, the
      kinds join in their order, evenly over that time.
    haystack: a text for the kinds that need one, see corpus.open_corpus.
    words: a folder of lists that keys are made of; "" is our own, see needles.words_of.
    tokenizer: "byte", "bpe-N", of N tokens and trained on samples, or a tokenizer.json's path.
    min_length: tokens of the shortest samples, with room for the answer; the longest fill a row.
    answer_only: whether the answers' tokens alone are learned, or the texts too.
    grow_examples: rows of the train split, then in their order, over which the longest samples grow
      from `min_length` to a row, slowly at first; 0 is all lengths from the start.
    train_examples: rows of the train split.
    held_out_examples: rows of the validation split, and of the test split.
    seed: of all examples.
  """

  kinds: str
  haystack: str
  words: str
  tokenizer: str
  min_length: int
  answer_only: bool
  grow_examples: int
  train_examples: int
  held_out_examples: int
  seed: int

  def __post_init__(self):
    """Raises UserError for the first knob that does not fit."""
    at_least(1, "data.niah", self, "min_length", "train_examples", "held_out_examples")
    at_least(0, "data.niah", self, "grow_examples", "seed")

  @property
  def loaded(self) -> tokenise.Tokenizer:
    """The tokenizer."""
    if self.tokenizer == "byte":
      return tokenise.ByteTokenizer()
    bpe, least = re.fullmatch(r"bpe-(\d+)", self.tokenizer), tokenise.MIN_BPE_VOCABULARY
    if bpe and int(bpe[1]) < least:
      raise UserError(f"data.niah.tokenizer={self.tokenizer!r}; accepted is at least 'bpe-{least}'")
    return _bpe(self, int(bpe[1])) if bpe else tokenise.load(self.tokenizer)

  @property
  def vocab_size(self) -> int:
    return self.loaded.vocab_size


class Rows:
  """Random access to a split's rows of T tokens, filled with samples and their answers."""

  def __init__(self, config: Config, split: str, seq_len: int):
    """Raises UserError when no sample fits into a row, or what samples are made of is missing."""
    self.config, self.seq_len, self.tokenizer = config, seq_len, config.loaded
    essay = essays.load(config.haystack) if config.haystack else None
    knobs = dict(words=needles.words_of(config.words), seed=config.seed, split=split)
    room = ANSWER_BYTES + 3  # for " ANSWER." and the end; a token has a byte at least
    knobs |= dict(essay=essay, anywhere=True, bare=True, new_tokens=room)
    kinds = [kind.strip() for kind in config.kinds.split(",")]
    self.generators = [haystacks.Generator(kind, self.tokenizer, **knobs) for kind in kinds]
    self.split = corpus.SPLITS.index(split)
    self.length = config.train_examples if split == "train" else config.held_out_examples
    self.grow = config.grow_examples if split == "train" else 0
    self.least = min(config.min_length, seq_len)
    for generator in self.generators:
      generator.sample(0, seq_len)

  @property
  def in_order(self) -> bool:
    """Whether a row must come after those before it."""
    return self.grow > 0

  def __len__(self) -> int:
    return self.length

  def grown(self, row: int) -> float:
    """How far the samples have grown, 0 to 1."""
    return min(1.0, row / self.grow) if self.grow else 1.0

  def longest(self, row: int) -> int:
    """The tokens of a row's longest sample."""
    share = self.grown(row) ** 2
    return round(self.least ** (1 - share) * self.seq_len**share)

  def generators_of(self, row: int) -> list[haystacks.Generator]:
    """Those of the kinds that have joined."""
    return self.generators[: int(self.grown(row) * len(self.generators)) + 1]

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([self.config.seed, self.split, row])
    result, used, generators = self.blank(), 0, self.generators_of(row)
    for index in range(self.seq_len):  # a sample has a token at least
      number = row * self.seq_len + index
      generator = generators[(row + index) % len(generators)]
      least, left = max(self.least, generator.shortest(number)), self.seq_len - used
      if least > left:
        break
      most, u = max(least, min(self.longest(row), left)), rng.random()
      # Evenly on a logarithmic scale; the others such that all lengths have as many tokens.
      length = 1 / ((1 - u) / least + u / most) if index else least ** (1 - u) * most**u
      question, answer = self._said(generator.sample(number, round(length)))
      stream = np.array([*question, *answer], np.int32)
      end = used + len(stream) - 1
      result["tokens"][used:end], result["targets"][used:end] = stream[:-1], stream[1:]
      result["segment_ids"][used:end] = index + 1
      result["weights"][end - len(answer) if self.config.answer_only else used : end] = 1
      used = end
    return result

  def _said(self, sample: needles.Sample) -> tuple[list[int], list[int]]:
    """The tokens of a document up to the answer, and from there to its end."""
    tokenizer = self.tokenizer
    question = [tokenizer.bos_id, *tokenizer.encode(sample.prompt + sample.prefix)]
    return question, [*tokenizer.encode(f" {sample.answer}."), tokenizer.eos_id]

  def blank(self) -> dict[str, np.ndarray]:
    """A row of padding."""
    end = self.tokenizer.eos_id
    return {
      "tokens": np.full(self.seq_len, end, np.int32),
      "targets": np.full(self.seq_len, end, np.int32),
      "segment_ids": np.zeros(self.seq_len, np.int32),
      "weights": np.zeros(self.seq_len, np.float32),
    }


@functools.cache
def _bpe(config: Config, vocab_size: int) -> tokenise.Tokenizer:
  """A BPE of samples from all of the time over which they grow, the same for the same config."""
  rows = Rows(dataclasses.replace(config, tokenizer="byte"), "train", BPE_ROW)
  among = min(config.grow_examples or BPE_ROWS, len(rows))

  def texts() -> Iterator[str]:
    for number in dict.fromkeys(i * among // BPE_ROWS for i in range(BPE_ROWS)):
      row = rows[number]
      begins = np.flatnonzero(np.diff(row["segment_ids"], prepend=0))
      for tokens in np.split(row["targets"], begins[1:]):
        yield rows.tokenizer.decode([t for t in tokens.tolist() if t != rows.tokenizer.eos_id])

  return tokenise.train_bpe(texts(), vocab_size)

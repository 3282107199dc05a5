"""A needle in a haystack: RULER's S-NIAH 1 to 3, at any length, in any tokenizer's tokens.

The needle is a line of the noise, or a sentence of the essay at one of 40 depths; experiments/
needles.py has the words. The haystack of every sample is the longest with which prompt, prefix and
the tokens to generate fit into the length. (The original steps by 500 words, or 25 lines, for all
samples at once: lengths have two modes, and where not even one step fits it never ends.)

As a task to train on, a row is filled with samples and their answers, each a segment of its own.
The first has a length drawn evenly on a logarithmic scale, the others are mostly short; the
shortest are a needle, few words and the prefix, without the question. Copying is learned over a few
tokens, and then over more and more: so the longest samples may grow from row to row. A haystack
begins at a random word, for were it always the first, as in what is scored, a model would learn
that text by heart. Sample i is drawn by a generator of its own, seeded by (seed, kind, split, i).
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from experiments import corpus, essays, needles, tokenise
from experiments.errors import UserError, at_least

ANSWER_BYTES = 36  # of a uuid


class Generator:
  """Samples of one kind by their number."""

  def __init__(
    self,
    kind: str,
    tokenizer: tokenise.Tokenizer,
    *,
    essay: essays.Essay | None = None,
    words: tuple[list[str], list[str]] = needles.words_of(""),
    new_tokens: int = needles.NEW_TOKENS,
    seed: int = 0,
    split: str = "test",
    anywhere: bool = False,
    bare: bool = False,
  ):
    """Samples of a kind.

    Args:
      kind: of needles.KINDS.
      tokenizer: whose tokens are counted.
      essay: the haystack of kinds that need one.
      words: (adjectives, nouns) of the keys.
      new_tokens: room for the answer.
      seed, split: of the samples.
      anywhere: whether the haystack begins at a random word of the essay, and not at its first.
      bare: whether a sample that is too short for the question goes without it.

    Raises:
      UserError: an unknown kind, or one that needs an essay and has none.
    """
    if kind not in needles.KINDS:
      raise UserError(f"kind {kind!r} is unknown; accepted are {', '.join(needles.KINDS)}")
    if needles.KINDS[kind][0] == "essay" and essay is None:
      raise UserError(f"{kind} hides its needle in an essay, but no haystack of text is given")
    self.kind, self.tokenizer = kind, tokenizer
    self.essay, self.words, self.new_tokens = essay, words, new_tokens
    self.anywhere, self.bare = anywhere, bare
    self.seed = [seed, list(needles.KINDS).index(kind), corpus.SPLITS.index(split)]

  def shortest(self, number: int) -> int:
    """The length of a sample without haystack."""
    return self._drawn(number, bare=self.bare)(0).length

  def sample(self, number: int, length: int, needle: bool = True) -> needles.Sample:
    """The sample with the most haystack in `length` tokens.

    Args:
      number: of the sample.
      length: most tokens of prompt, prefix and what is to be generated.
      needle: whether the answer stands in the haystack; else it is nowhere said.

    Raises:
      UserError: what is asked does not fit by itself.
    """
    attempt = self._drawn(number, needle)
    best = attempt(0)
    if best.length > length and self.bare:
      attempt = self._drawn(number, needle, bare=True)
      best = attempt(0)
    if best.length > length:
      raise UserError(
        f"length={length} is too short for {self.kind}; accepted is at least {best.length}: what"
        f" is asked takes {best.length - self.new_tokens} tokens and the answer {self.new_tokens}"
      )
    # By interpolation and, every third turn, bisection: the end is near and always comes.
    fits, too_long, turn = 0, length + 1, 0  # a unit has a token at least
    guess = int((length - best.length) / self.tokens_per_unit)
    while too_long - fits > 1:
      guess = min(max(guess, fits + 1), too_long - 1)
      found = attempt(guess)
      if found.length <= length:
        fits, best = guess, found
      else:
        too_long = guess
      units = (length - found.length) / self.tokens_per_unit
      turn += 1
      guess = guess + (int(units) or (1 if units >= 0 else -1))
      guess = (fits + too_long) // 2 if turn % 3 == 0 else guess
    return best

  def _drawn(
    self, number: int, needle: bool = True, bare: bool = False
  ) -> Callable[[int], needles.Sample]:
    """The sample as a function of how many lines or words of haystack it has."""
    rng = np.random.default_rng([*self.seed, number])
    key, answer = needles.key(rng, self.words), needles.value(rng, self.kind)
    haystack = needles.KINDS[self.kind][0]
    depth, place = int(rng.choice(needles.DEPTHS)), rng.random()
    start = rng.integers(len(self.essay.words)) if self.anywhere and self.essay else 0

    def attempt(units: int) -> needles.Sample:
      if haystack == "noise":
        first = int(place * units)
        before, after = ("\n".join([needles.LINE] * n) for n in (first, units - first))
      else:
        before, after = self.essay.cut(units, depth, start)
      said = answer if needle else ""
      prompt, prefix = needles.render(self.kind, key, said, before, after, asked=not bare)
      tokens = len(self.tokenizer.encode(prompt + prefix))
      return needles.Sample(self.kind, prompt, prefix, answer, tokens + self.new_tokens)

    return attempt

  @functools.cached_property
  def tokens_per_unit(self) -> float:
    """About how many tokens a line of noise or a word of the essay has."""
    units = (
      [needles.LINE] * 8 if needles.KINDS[self.kind][0] == "noise" else self.essay.words[:2000]
    )
    return max(1.0, len(self.tokenizer.encode(" ".join(units))) / len(units))


@dataclasses.dataclass(frozen=True)
class Config:
  """The knobs of the task.

  Attributes:
    kinds: names of needles.KINDS, separated by commas; the samples take turns. Where they grow, the
      kinds join in their order, evenly over that time.
    haystack: a text for the kinds that need one, see corpus.open_corpus.
    words: a folder of lists that keys are made of; "" is our own, see needles.words_of.
    tokenizer: "byte", or the path of a tokenizer.json.
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

  @functools.cached_property
  def loaded(self) -> tokenise.Tokenizer:
    """The tokenizer."""
    return tokenise.ByteTokenizer() if self.tokenizer == "byte" else tokenise.load(self.tokenizer)

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
    self.generators = [Generator(kind, self.tokenizer, **knobs) for kind in kinds]
    self.split = corpus.SPLITS.index(split)
    self.length = config.train_examples if split == "train" else config.held_out_examples
    self.grow = config.grow_examples if split == "train" else 0
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
    return round(min(self.config.min_length, self.seq_len) ** (1 - share) * self.seq_len**share)

  def generators_of(self, row: int) -> list[Generator]:
    """Those of the kinds that have joined."""
    return self.generators[: int(self.grown(row) * len(self.generators)) + 1]

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([self.config.seed, self.split, row])
    result, used, generators = self.blank(), 0, self.generators_of(row)
    for index in range(self.seq_len):  # a sample has a token at least
      number = row * self.seq_len + index
      generator = generators[(row + index) % len(generators)]
      least, left = max(self.config.min_length, generator.shortest(number)), self.seq_len - used
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

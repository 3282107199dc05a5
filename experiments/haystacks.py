"""A needle in a haystack: RULER's S-NIAH 1 to 3, at any length, in any tokenizer's tokens.

The needle is a line of the noise, or a sentence of the essay at one of 40 depths; experiments/
needles.py has the words. The haystack of every sample is the longest with which prompt, prefix and
the tokens to generate fit into the length. (The original steps by 500 words, or 25 lines, for all
samples at once: lengths have two modes, and where not even one step fits it never ends.)

Sample i is drawn by a generator of its own, seeded by (seed, kind, split, i).
"""

import functools
from collections.abc import Callable

import numpy as np

from experiments import corpus, essays, needles, tokenise
from experiments.errors import UserError


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

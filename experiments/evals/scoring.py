"""Log-likelihoods of continuations, of whole texts, and greedy continuations, by the thousand.

Texts of alike lengths are read together. A context is read once: its state, which does not grow
with it, serves all of its continuations, so that n choices after c tokens cost c + n a tokens and
not n (c + a). The same state carries a long text from piece to piece, so nothing is cut off.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from experiments.evals import decode

Tokens = Sequence[int]
T = TypeVar("T")


class Scorer:
  """A model's answers about tokens; a context, or a text, begins with what stands before one."""

  def __init__(
    self,
    lm: Any,
    bos_id: int,
    *,
    rows: int = 16,
    piece: int = decode.PIECE,
    track: Callable[[list], Iterable] = iter,
  ):
    """Makes the programs of a model, see Decoder.

    Args:
      lm: the model.
      bos_id: what stands before a text.
      rows: texts read at a time.
      piece: most tokens of a text read at a time.
      track: goes through the batches of a call, and may show how far it is.
    """
    self.decoder = decode.Decoder(lm, piece=piece, rows=rows)
    self.bos_id, self.rows, self.track = bos_id, rows, track

  def loglikelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
    """(log-probability in nats, whether each token was the likeliest) of (context, continuation).

    A context may be empty, or begin with the token that stands before a text.
    """
    contexts: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(pairs):
      contexts.setdefault(self._begun(context), []).append(number)
    found: dict[int, tuple[float, bool]] = {}
    for batch in self.track(self._batches(list(contexts), len)):
      reading = self.decoder.read(batch)
      asked = [(row, number) for row, context in enumerate(batch) for number in contexts[context]]
      for some in self._batches(asked, lambda x: len(pairs[x[1]][1])):
        rows = self.decoder.take(reading, [row for row, _ in some])
        nats, likeliest, _ = self.decoder.score(rows, [pairs[number][1] for _, number in some])
        for (_, number), value, best in zip(some, nats, likeliest):
          found[number] = (-float(value), best)
    return [found[number] for number in range(len(pairs))]

  def texts(self, texts: Sequence[Tokens]) -> list[float]:
    """The log-probability of each whole text in nats, however long it is."""
    found: dict[int, float] = {}
    for batch in self.track(self._batches(range(len(texts)), lambda i: len(texts[i]))):
      start = self.decoder.read([[self.bos_id]] * len(batch))
      nats, _, _ = self.decoder.score(start, [texts[i] for i in batch])
      found |= {i: -float(value) for i, value in zip(batch, nats)}
    return [found[i] for i in range(len(texts))]

  def greedy(
    self, contexts: Sequence[Tokens], most: int, done: Callable[[int, list[int]], bool]
  ) -> list[list[int]]:
    """The likeliest tokens after each context; see Decoder.greedy for `done`."""
    found: dict[int, list[int]] = {}
    for batch in self.track(self._batches(range(len(contexts)), lambda i: len(contexts[i]))):
      reading = self.decoder.read([self._begun(contexts[i]) for i in batch])
      ends = lambda row, tokens, batch=batch: done(batch[row], tokens)
      found |= dict(zip(batch, self.decoder.greedy(reading, most, ends)))
    return [found[i] for i in range(len(contexts))]

  def _begun(self, context: Tokens) -> tuple[int, ...]:
    """A context behind the token that stands before a text."""
    return (self.bos_id,) * (list(context[:1]) != [self.bos_id]) + tuple(context)

  def _batches(self, items: Sequence[T], length: Callable[[T], int]) -> list[list[T]]:
    """The items by falling length, `rows` at a time."""
    ordered = sorted(items, key=length, reverse=True)
    return [ordered[at : at + self.rows] for at in range(0, len(ordered), self.rows)]

"""Reading, scoring and greedy decoding of many texts on a model whose state does not grow.

    decoder = Decoder(lm)
    reading = decoder.read(contexts)                       # token lists of any lengths
    nats, likeliest = decoder.score(decoder.take(reading, rows), continuations)
    new = decoder.greedy(reading, 128)

A text is read piece by piece from the state that the piece before left, so that no length is
compiled for by itself and memory does not grow with it; a `Reading` can be gone on from any number
of times. That is exact for every mixer as long as attention's cache holds the text.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments.evals import perplexity

PIECE = 256  # most tokens read at a time
LEAST = 8  # fewest; sizes are powers of two, so few programs are compiled
STEPS = 16  # tokens generated between two looks at them

Texts = Sequence[Sequence[int]]


class Reading(NamedTuple):
  """What has been read of some texts: `count` rows, and padding up to a power of two."""

  state: Any
  hidden: Float[Array, "B W"]  # the head's input after the last token
  count: int


class Decoder:
  """The compiled programs of one model."""

  def __init__(self, lm: Any, *, piece: int = PIECE, rows: int = 1):
    """Makes the programs of a `trellis_jax.LM`, or of anything called like one.

    Args:
      lm: the model.
      piece: most tokens read at a time, of each row.
      rows: fewest rows of a call; fewer texts are padded up to it, so that less is compiled.
    """
    self.graph, self.params = nnx.split(lm)
    self.piece, self.rows = piece, rows

  def read(self, texts: Texts) -> Reading:
    """Reads texts of at least one token each from nothing."""
    rows = _up(len(texts), self.rows)
    state, hidden = _start(self.graph, rows, self.params)
    return self._go_on(Reading(state, hidden, len(texts)), texts, scored=False)[0]

  def take(self, reading: Reading, rows: Sequence[int]) -> Reading:
    """The rows of a reading in any order, any number of times."""
    index = np.zeros(_up(len(rows), self.rows), np.int32)
    index[: len(rows)] = rows
    repeated, rest = reading.state
    # Layers that repeat have their axis before the batch.
    state = (
      jax.tree.map(lambda x: x[:, index], repeated),
      jax.tree.map(lambda x: x[index], rest),
    )
    return Reading(state, reading.hidden[index], len(rows))

  def score(
    self, reading: Reading, texts: Texts
  ) -> tuple[Float[np.ndarray, " N"], list[bool], Reading]:
    """Scores what follows on each row of a reading.

    Returns:
      nats of each text, fp64 sums; whether each of its tokens was the likeliest; the reading after.
    """
    after, nats, likeliest = self._go_on(reading, texts, scored=True)
    return nats, likeliest, after

  def greedy(
    self,
    reading: Reading,
    most: int,
    done: Callable[[int, list[int]], bool] = lambda row, tokens: False,
  ) -> list[list[int]]:
    """The likeliest tokens after each row, `most` of them at most.

    Args:
      reading: where to go on from.
      most: tokens of a row.
      done: called with (row, its tokens so far) now and then; true when it needs no more.
    """
    state, hidden, count = reading
    rows: list[list[int]] = [[] for _ in range(count)]
    for start in range(0, most, STEPS):
      tokens, state, hidden = _generate(self.graph, self.params, state, hidden)
      for row, new in zip(rows, np.asarray(tokens)):
        row += new[: most - start].tolist()
      if all(done(i, row) for i, row in enumerate(rows)):
        break
    return rows

  def _go_on(self, reading: Reading, texts: Texts, scored: bool):
    """(reading, nats, likeliest) after the texts, one for each row."""
    state, hidden, count = reading
    lengths = np.zeros(len(hidden), np.int64)
    lengths[:count] = [len(text) for text in texts]
    nats, likeliest = np.zeros(len(hidden)), np.ones(len(hidden), bool)
    at = 0
    while at < (longest := lengths.max(initial=0)):
      size = min(self.piece, _up(longest - at, LEAST))
      live = np.clip(lengths - at, 0, size).astype(np.int32)
      tokens = np.zeros((len(hidden), size), np.int32)
      for row, text, number in zip(tokens, texts, live):
        row[:number] = text[at : at + number]
      state, hidden, scores = _advance(self.graph, scored, self.params, state, hidden, tokens, live)
      if scored:
        # Added up here, in fp64: texts of equal tokens are equal, however they were padded.
        nats += np.asarray(scores[0], np.float64).sum(1)
        likeliest &= np.asarray(scores[1])
      at += size
    return Reading(state, hidden, count), nats[:count], likeliest[:count].tolist()


def _up(number: int, least: int) -> int:
  """The smallest power of two of at least both."""
  return max(least, 1 << (int(number) - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(graph, rows: int, params):
  """The state of rows that have read nothing, and no hidden vector."""
  lm = nnx.merge(graph, params)
  hidden = jax.eval_shape(lambda: lm.hidden(jnp.zeros((rows, 1), jnp.int32))[0])
  return lm.init_state(rows), jnp.zeros((rows, hidden.shape[-1]), hidden.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advance(graph, scored: bool, params, state, hidden, tokens, live: Int[Array, " B"]):
  """Reads `live` tokens of each row; returns (state, hidden, (nats [B, T], all likeliest [B]))."""
  lm = nnx.merge(graph, params)
  counts = jnp.arange(tokens.shape[1])[None] < live[:, None]
  x, state = lm.hidden(tokens, state, segment_ids=counts.astype(jnp.int32))
  scores = None
  if scored:
    before = jnp.concatenate([hidden[:, None], x[:, :-1]], axis=1)
    nats, likeliest = perplexity.token_scores(before, lm.head_kernel(), tokens)
    scores = jnp.where(counts, nats, 0.0), (likeliest | ~counts).all(1)
  last = jnp.take_along_axis(x, jnp.maximum(live - 1, 0)[:, None, None], axis=1)[:, 0]
  return state, jnp.where(live[:, None] > 0, last, hidden), scores


@functools.partial(jax.jit, static_argnums=0)
def _generate(graph, params, state, hidden):
  """The STEPS likeliest tokens [B, STEPS] after `hidden`, and (state, hidden) after them."""
  lm = nnx.merge(graph, params)
  kernel = lm.head_kernel()

  def step(carry, _):
    state, hidden = carry
    logits = jnp.einsum("bw,wv->bv", hidden, kernel, preferred_element_type=jnp.float32)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    x, state = lm.hidden(token[:, None], state)
    return (state, x[:, 0]), token

  (state, hidden), tokens = jax.lax.scan(step, (state, hidden), None, length=STEPS)
  return tokens.T, state, hidden

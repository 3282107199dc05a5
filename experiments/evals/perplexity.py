"""Held-out perplexity: the negative log-likelihood of every token of a split, by position.

    evaluator = Evaluator(predict(graphdef), batches=..., seq_len=..., token_bytes=...)
    for name, value in evaluator.run(params): ...

A split is read as the loader cuts it: rows of T tokens that do not overlap, in the file's order,
every token and every end of document a target once. A row starts from nothing, so a prediction
sees what stands before it of its own segment in its own row and nothing else. This is its
*position*: how many inputs of its segment in this row come before the one it is read from, 0 where
a document, or the piece of one that a row cuts off, begins. Positions are counted in buckets

    0-15, 16-31, 32-63, 64-127, ..., up to T - 1

of which the first begins at 0 and each later one at a power of two from 16 on; the last one ends at
T - 1 whether that is a power of two less one or not.

    perplexity = exp(nats / tokens),   bits per byte = nats / log 2 / bytes

where `tokens` counts all targets, ends of documents too, and `bytes` their utf-8 bytes, of which an
end of document has none.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from experiments import loss

Batch = dict[str, Any]  # tokens, targets, segment_ids, weights: [B, T]
Predict = Callable[[Any, Batch], Float[Array, "B T"]]

FIRST_EDGE = 16  # where the second bucket begins


@dataclasses.dataclass(frozen=True)
class Totals:
  """Sums over the targets of a position bucket, or of a whole split."""

  nats: float
  tokens: int
  bytes: int

  @property
  def perplexity(self) -> float:
    return math.exp(min(self.nats / self.tokens, 700.0)) if self.tokens else math.nan

  @property
  def bits_per_byte(self) -> float:
    return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def edges(seq_len: int) -> list[int]:
  """The first position of each bucket: 0, 16, 32, 64, ... below `seq_len`."""
  result = [0]
  while (edge := 2 * result[-1] or FIRST_EDGE) < seq_len:
    result.append(edge)
  return result


def ranges(seq_len: int) -> list[tuple[int, int]]:
  """The first and last position of each bucket."""
  first = edges(seq_len)
  return list(zip(first, [edge - 1 for edge in first[1:]] + [seq_len - 1]))


def positions(segment_ids: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
  """How many inputs of the same segment stand before each one in its row."""
  at = np.arange(segment_ids.shape[1])[None]
  begins = np.diff(segment_ids, axis=1, prepend=-1) != 0
  return (at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)).astype(np.int32)


def buckets(segment_ids: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
  """The bucket of each position, an index into `edges(T)`."""
  first = edges(segment_ids.shape[1])
  found = np.searchsorted(first, positions(segment_ids), side="right") - 1
  return found.astype(np.int32)


def token_scores(
  hidden: Float[Array, "B T W"], kernel: Float[Array, "W vocab"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
  """-log softmax(hidden @ kernel)[target] in nats, fp32, and whether the target is the likeliest.

  One chunk's logits exist at a time.
  """
  batch, seq_len = targets.shape
  chunk = loss.chunk_length(batch, seq_len)
  pad = -seq_len % chunk
  split = lambda x: jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :seq_len]
  kernel = kernel.astype(jnp.float32)

  def one_chunk(xs):
    h, target = xs
    logits = h.astype(jnp.float32) @ kernel
    at_target = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - at_target
    return nll, jnp.argmax(logits, axis=-1) == target

  hidden = split(jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))))
  scores = jax.lax.map(one_chunk, (hidden, split(jnp.pad(targets, ((0, 0), (0, pad))))))
  return join(scores[0]), join(scores[1])


def token_nll(
  hidden: Float[Array, "B T W"], kernel: Float[Array, "W vocab"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
  """The nats of `token_scores`."""
  return token_scores(hidden, kernel, targets)[0]


def predict(graphdef: nnx.GraphDef) -> Predict:
  """The nats of a batch's targets under a language model, as a function of its parameters."""

  def nats(params: Any, batch: Batch) -> Float[Array, "B T"]:
    lm = nnx.merge(graphdef, params)
    hidden, _ = lm.hidden(batch["tokens"], segment_ids=batch["segment_ids"])
    return token_nll(hidden, lm.head_kernel(), batch["targets"])

  return nats


class Evaluator:
  """Evaluates parameters on batches, which it asks for anew at each run."""

  def __init__(
    self,
    predict: Predict,
    *,
    batches: Callable[[], Iterable[dict[str, np.ndarray]]],
    seq_len: int,
    token_bytes: Int[np.ndarray, " vocab"],
    put_batch: Callable[[Batch], Batch] = lambda batch: batch,
  ):
    """Args:
    predict: (params, batch) -> nats of each target [B, T].
    batches: makes the batches of one run, as `data.loader` with repeat=False gives them.
    seq_len: T.
    token_bytes: utf-8 bytes of each token.
    put_batch: lays a batch over the devices.
    """
    self.batches, self.put_batch = batches, put_batch
    self.ranges = ranges(seq_len)
    self.token_bytes = np.asarray(token_bytes, np.int64)

    def nats_by_bucket(params: Any, batch: Batch) -> Float[Array, " buckets"]:
      # Where a target does not count, its nats may be anything: 0 times them is not always 0.
      counts = batch["weights"] > 0
      nats = jnp.where(counts, batch["weights"] * predict(params, batch), 0.0)
      return jax.ops.segment_sum(nats.ravel(), batch["buckets"].ravel(), len(self.ranges))

    self.nats_by_bucket = jax.jit(nats_by_bucket)

  def run(self, params: Any) -> Iterator[tuple[str, float]]:
    """Yields nll (nats per token), perplexity, bits_per_byte, tokens, bytes, and per bucket
    perplexity/FIRST-LAST and tokens/FIRST-LAST.
    """
    by_position = self.totals(params)
    total = add(by_position)
    yield "nll", total.nats / total.tokens
    yield "perplexity", total.perplexity
    yield "bits_per_byte", total.bits_per_byte
    yield "tokens", total.tokens
    yield "bytes", total.bytes
    for (first, last), totals in zip(self.ranges, by_position):
      yield f"perplexity/{first}-{last}", totals.perplexity
      yield f"tokens/{first}-{last}", totals.tokens

  def totals(self, params: Any) -> list[Totals]:
    """The sums of each bucket of `ranges(seq_len)`, in fp64 over the batches' fp32 sums."""
    count = len(self.ranges)
    nats, tokens, size = np.zeros(count), np.zeros(count, np.int64), np.zeros(count, np.int64)
    pending = None
    for batch in self.batches():
      batch = {**batch, "buckets": buckets(batch["segment_ids"])}
      running = self.nats_by_bucket(params, self.put_batch(batch))
      if pending is not None:  # read while this batch runs, so that the device does not wait
        nats += np.asarray(pending, np.float64)
      pending = running
      counted = batch["weights"] > 0
      bucket = batch["buckets"][counted]
      tokens += np.bincount(bucket, minlength=count)
      np.add.at(size, bucket, self.token_bytes[batch["targets"][counted]])
    if pending is not None:
      nats += np.asarray(pending, np.float64)
    return [Totals(float(n), int(t), int(b)) for n, t, b in zip(nats, tokens, size)]


def add(parts: Iterable[Totals]) -> Totals:
  """The totals of several buckets together."""
  parts = list(parts)
  return Totals(
    math.fsum(p.nats for p in parts), sum(p.tokens for p in parts), sum(p.bytes for p in parts)
  )

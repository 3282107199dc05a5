"""Sampling from a language model whose state does not grow with the text."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trellis_jax.typing import Array


def generate(
  lm: Any,
  prompts: Array | Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  prompt_mask: Array | None = None,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  stop_tokens: Sequence[int] = (),
  rng: Array | int = 0,
  on_token: Callable[[int, np.ndarray], None] | None = None,
) -> list[list[int]]:
  """Continues a batch of prompts: one call over all prompt tokens, then one token at a time.

  Left-padded, right-padded and unpadded prompts give the same tokens, and a row's tokens do not
  depend on the other rows of the batch.

  Args:
    lm: a `trellis_jax.LM`, or anything called like one.
    prompts: token lists of any lengths >= 1, or an array [B, T] with `prompt_mask`.
    max_new_tokens: most tokens to add to a row.
    prompt_mask: [B, T], true where an array's token is one; None: everywhere.
    temperature: of the softmax; 0 takes the likeliest token.
    top_k: keeps the k likeliest tokens; 0 keeps all.
    top_p: keeps the likeliest tokens that together have this probability.
    stop_tokens: a row ends after one of these, which is kept.
    rng: key or seed; row i draws from its own stream.
    on_token: called with (step, tokens [B]) as they come; -1 for rows that have ended.

  Returns:
    The new tokens of each row.

  Raises:
    ValueError: an argument is outside of what is stated here.
  """
  vocab = lm.cfg.vocab_size
  tokens, lengths = _pack(prompts, prompt_mask, vocab)
  _check(max_new_tokens, temperature, top_k, top_p, stop_tokens, vocab)
  segment_ids = (np.arange(tokens.shape[1])[None] < lengths[:, None]).astype(np.int32)
  graph, params = nnx.split(lm)
  key = jax.random.key(rng) if isinstance(rng, int | np.integer) else rng
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(tokens)))
  sampling = (float(temperature), int(top_k), float(top_p))

  rows: list[list[int]] = [[] for _ in tokens]
  ended = np.zeros(len(tokens), bool)
  token, state = _prefill(graph, sampling, params, tokens, segment_ids, lengths - 1, keys)
  for step in range(max_new_tokens):
    # The next token is asked for before this one is looked at, so the device does not wait.
    ahead = None
    if step + 1 < max_new_tokens:
      ahead = _next(graph, sampling, params, state, token, keys, step + 1)
    now = np.where(ended, -1, np.asarray(token))
    for row, value in zip(rows, now):
      if value >= 0:
        row.append(int(value))
    if on_token is not None:
      on_token(step, now)
    ended |= np.isin(now, np.asarray(stop_tokens, np.int64))
    if ended.all() or ahead is None:
      break
    token, state = ahead
  return rows


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(graph, sampling, params, tokens, segment_ids, last, keys):
  """Reads the prompts at once; returns (first new token [B], state)."""
  lm = nnx.merge(graph, params)
  x, state = lm.hidden(tokens, segment_ids=segment_ids)
  x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
  return _sample(sampling, _logits(lm, x), keys, 0), state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next(graph, sampling, params, state, token, keys, step):
  """Reads one token of each row; returns (next token [B], state)."""
  lm = nnx.merge(graph, params)
  x, state = lm.hidden(token[:, None], state)
  return _sample(sampling, _logits(lm, x[:, 0]), keys, step), state


def _logits(lm, x):
  return jnp.einsum("bd,dv->bv", x, lm.head_kernel(), preferred_element_type=jnp.float32)


def _sample(sampling, logits, keys, step):
  """Draws one token of each row [B] from logits [B, vocab]."""
  temperature, top_k, top_p = sampling
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / temperature
  if top_k or top_p < 1:
    ranked = jnp.sort(logits, axis=-1, descending=True)
    if top_k:
      logits = jnp.where(
        logits < ranked[:, min(top_k, ranked.shape[1]) - 1, None], -jnp.inf, logits
      )
      ranked = jnp.sort(logits, axis=-1, descending=True)
    if top_p < 1:
      # A token stays while the ones ahead of it have less than top_p; the first always stays.
      probability = jax.nn.softmax(ranked, axis=-1)
      ahead = jnp.cumsum(probability, axis=-1) - probability
      least = jnp.min(jnp.where(ahead < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
      logits = jnp.where(logits < least, -jnp.inf, logits)
  draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row)
  return jax.vmap(draw)(keys, logits).astype(jnp.int32)


def _pack(prompts, mask, vocab: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (tokens [B, T] with padding behind, lengths [B])."""
  if hasattr(prompts, "ndim"):
    if prompts.ndim != 2:
      raise ValueError(f"prompts has shape {prompts.shape}; accepted is [B, T] or a list of lists")
    array = np.asarray(prompts)
    mask = np.ones(array.shape, bool) if mask is None else np.asarray(mask, bool)
    if mask.shape != array.shape:
      raise ValueError(f"prompt_mask has shape {mask.shape}; it must be {array.shape}")
    rows = [row[keep] for row, keep in zip(array, mask)]
  elif mask is not None:
    raise ValueError("prompt_mask goes with prompts as an array [B, T]; lists have their lengths")
  else:
    rows = [np.asarray(row, np.int64) for row in prompts]
  if not rows:
    raise ValueError("prompts is empty; accepted is at least one row")
  lengths = np.asarray([len(row) for row in rows], np.int32)
  if lengths.min() == 0:
    raise ValueError(f"prompt {int(lengths.argmin())} has no tokens; accepted is at least one")
  tokens = np.zeros((len(rows), lengths.max()), np.int32)
  for to, row in zip(tokens, rows):
    if row.min() < 0 or row.max() >= vocab:
      bad = row[(row < 0) | (row >= vocab)][0]
      raise ValueError(f"a prompt holds the token {bad}; accepted are 0 .. {vocab - 1}")
    to[: len(row)] = row
  return tokens, lengths


def _check(max_new_tokens, temperature, top_k, top_p, stop_tokens, vocab) -> None:
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens={max_new_tokens} is not accepted; it must be >= 1")
  if not 0 <= temperature < float("inf"):
    raise ValueError(f"temperature={temperature} is not accepted; it must be finite and >= 0")
  if top_k < 0:
    raise ValueError(f"top_k={top_k} is not accepted; it must be >= 0")
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p={top_p} is not accepted; it lies in (0, 1]")
  for token in stop_tokens:
    if not 0 <= token < vocab:
      raise ValueError(f"stop token {token} is not accepted; accepted are 0 .. {vocab - 1}")

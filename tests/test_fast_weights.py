"""Networks trained by the tokens: chunks equal the token loop, splits equal one pass."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest

from trellis_jax.ops import fast_weights as fw
from trellis_jax.ops import fast_weights_reference as reference
from trellis_jax.ops.token_loop import token_loop

jax.config.update("jax_numpy_rank_promotion", "raise")

B, T, H, D, V = 2, 21, 2, 3, 3
# Row 0 restarts inside chunks and ends early, row 1 restarts at 16 and is full.
RUN = np.asarray([[0] * 5 + [1] * 2 + [2] * 14, [0] * 16 + [1] * 5], np.int32)
COUNT = np.asarray([18, 21], np.int32)
CASES = ("ttt_linear", "ttt_mlp", "titans")


def _loss(norm, out, k, v):
  """|LN(out) - (v - k)|^2 / 2, or |out - v|^2 / 2 without an affine."""
  if norm is None:
    return 0.5 * jnp.sum((out - v) ** 2, -1)
  weight, bias = norm
  y = jax.nn.standardize(out, epsilon=0.3) * weight + bias
  return 0.5 * jnp.sum((y - (v - k)) ** 2, -1)


def _inputs(case, chunk_size, dtype=np.float64, t=T):
  """Returns (arrays to differentiate, static makers)."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  sigmoid = lambda *shape: jax.nn.sigmoid(normal(*shape))
  widths = {"ttt_linear": (D, V), "ttt_mlp": (D, 5, V), "titans": (D, 4, 5, V)}[case]
  bias = lambda n: None if case == "titans" else 0.1 * normal(H, n)
  sizes = list(itertools.pairwise(widths))
  network = tuple(fw.Layer(normal(H, i, o) * i**-0.5, bias(o)) for i, o in sizes)
  tokens = [normal(B, t, H, n) for n in (D, D, V)]
  gates = (0.05 * sigmoid(B, t, H),)
  if case == "titans":
    gates += tuple(jnp.log(sigmoid(B, t, H)) for _ in range(2))
    return dict(network=network, tokens=tokens, gates=gates, scale=None, norm=None)
  scale = 1 / jnp.arange(1, chunk_size + 1, dtype=dtype)
  norm = (1 + 0.1 * normal(H, V), 0.1 * normal(H, V))
  return dict(network=network, tokens=tokens, gates=gates, scale=scale, norm=norm)


def _rule(x):
  return fw.Titans() if x["scale"] is None else fw.TTT(x["scale"])


def _chunked(x, chunk_size, run=None, count=None, state=None, at=slice(None)):
  wide = jax.tree.map(lambda a: a[None, :, None], x["norm"])
  return fw.fast_weights(
    _rule(x),
    functools.partial(_loss, wide),
    x["network"],
    *(a[:, at] for a in x["tokens"]),
    tuple(g[:, at] for g in x["gates"]),
    state=state,
    run=None if run is None else run[:, at],
    count=count,
    chunk_size=chunk_size,
  )


def _loop(x, chunk_size, run=None, count=None):
  rule = _rule(x)
  q, k, v = x["tokens"]
  b, t = q.shape[:2]
  init = fw.start(rule, x["network"])
  live = jnp.arange(t)[None] < (jnp.full((b,), t) if count is None else count)[:, None]
  return token_loop(
    lambda norm: reference.fast_weights(rule, functools.partial(_loss, norm)),
    x["norm"],
    jax.tree.map(lambda s: jnp.broadcast_to(s[None], (b, *s.shape)), init),
    init,
    (k, v, x["gates"]),
    q,
    jnp.zeros((b, t), jnp.int32) if run is None else run,
    live,
    chunk_size,
  )


@functools.partial(jax.jit, static_argnums=(0, 2))
def _outputs_and_grads(form, x, chunk_size, run, count):
  def scalar(x):
    out, end = form(x, chunk_size, run, count)
    memory = end.memory if form is _chunked else end
    return op_cases.scalar(out, memory), (out, memory)

  return jax.value_and_grad(scalar, has_aux=True)(x)


@pytest.mark.parametrize(("chunk_size", "packed"), [(1, True), (4, True), (16, False)])
@pytest.mark.parametrize("case", CASES)
def test_chunks_equal_the_token_loop(case, chunk_size, packed):
  run, count = (jnp.asarray(RUN), jnp.asarray(COUNT)) if packed else (None, None)
  with jax.enable_x64(True):
    x = _inputs(case, chunk_size)
    (_, want), want_grads = _outputs_and_grads(_loop, x, chunk_size, run, count)
  x = jax.tree.map(lambda a: a.astype(jnp.float32), x)
  (_, got), grads = _outputs_and_grads(_chunked, x, chunk_size, run, count)
  assert op_cases.distance(got, want) <= 1e-5
  assert op_cases.distance(grads, want_grads) <= 1e-4


@functools.partial(jax.jit, static_argnums=(1, 4))
def _pieces_and_grads(x, chunk_size, run, count, splits):
  """As `_outputs_and_grads`, in pieces that go on from each other's states."""

  def scalar(x):
    outs, state = [], None
    for start, stop in zip((0, *splits), (*splits, T)):
      at, here, entered = slice(start, stop), None, None
      if run is not None:
        here = jnp.clip(count - start, 0, stop - start)
        # Run numbers count from the state's run.
        entered = run - (run[:, start - 1 : start] if start else 0)
      out, state = _chunked(x, chunk_size, entered, here, state, at)
      outs.append(out)
    result = jnp.concatenate(outs, axis=1), state
    return op_cases.scalar(*result), result

  return jax.value_and_grad(scalar, has_aux=True)(x)


@pytest.mark.parametrize("case", ["ttt_linear", "titans"])
def test_any_split_is_one_pass(case):
  run, count, splits = jnp.asarray(RUN), jnp.full((B,), T), (1, 4, 15)
  x = _inputs(case, 4, np.float32)
  (_, want), want_grads = _pieces_and_grads(x, 4, run, count, ())
  (_, got), grads = _pieces_and_grads(x, 4, run, count, splits)
  assert op_cases.distance(got, want) <= 1e-5
  assert op_cases.distance(grads, want_grads) <= 1e-4


def test_padding_reads_zero_and_writes_nothing():
  x = _inputs("titans", 4, np.float32)
  count = jnp.asarray(COUNT)
  out, state = _chunked(x, 4, None, count)
  assert np.all(np.asarray(out[0, 18:]) == 0)
  short = jax.tree.map(lambda a: a[:, :18], dict(tokens=x["tokens"], gates=x["gates"]))
  alone, alone_state = _chunked(x | short, 4)
  first = lambda tree: jax.tree.map(lambda a: a[0], tree)
  assert op_cases.distance(out[0, :18], alone[0]) <= 1e-6
  assert op_cases.distance(first(state), first(alone_state)) <= 1e-6


@pytest.mark.parametrize("case", CASES)
def test_long_sequences_stay_finite(case):
  x = _inputs(case, 16, np.float32, t=4096)
  out, state = jax.jit(lambda x: _chunked(x, 16))(x)
  assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves((out, state)))

"""Attention: its op and mixer against a naive softmax in float64, and what its cache holds."""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from flax import nnx

from trellis_jax import mixers, rotary
from trellis_jax.ops import attention

jax.config.update("jax_numpy_rank_promotion", "raise")

WIDTH, HEADS, T = 16, 4, 14


def _naive(q, k, v, run, window):
  """The definition with all scores at once, in the arrays' dtype; run [B, T]."""
  length, heads = q.shape[1], q.shape[2]
  k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
  scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
  behind = np.arange(length)[:, None] - np.arange(length)[None]
  sees = (behind >= 0) & (behind < (window or length))
  sees = sees[None, None] & (run[:, None, :, None] == run[:, None, None, :])
  scores = jnp.where(sees, scores, -jnp.inf)
  p = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  return jnp.einsum("bhts,bshd->bthd", p / jnp.sum(p, axis=-1, keepdims=True), v)


def _arrays(length, groups, dtype=np.float64):
  rng = np.random.default_rng(0)
  normal = lambda h: jnp.asarray(rng.normal(size=(2, length, h, 6)), dtype)
  return normal(4), normal(groups), normal(groups)


@pytest.mark.parametrize("window", [0, 1, 5, 60])
@pytest.mark.parametrize(("length", "groups"), [(7, 4), (8, 2), (77, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_op_equals_a_naive_softmax(monkeypatch, window, length, groups, packed):
  monkeypatch.setattr(attention, "BLOCK", 8)  # 77 tokens: ten blocks in five groups
  run = np.sort(np.random.default_rng(1).integers(0, 3, (2, length))) if packed else None

  def loss(f, arrays):
    o = f(*arrays)
    return jnp.sum(jnp.sin(o + jnp.arange(o.size, dtype=o.dtype).reshape(o.shape))), o

  op = lambda q, k, v: attention.attend(q, k, v, runs=(run, run) if packed else None, window=window)
  naive = lambda q, k, v: _naive(q, k, v, np.zeros((2, length)) if run is None else run, window)
  results = []
  with jax.enable_x64(True):
    for f, dtype in ((op, np.float32), (naive, np.float64)):
      step = jax.value_and_grad(lambda arrays, f=f: loss(f, arrays), has_aux=True)
      results.append(jax.device_get(jax.jit(step)(_arrays(length, groups, dtype))))
  (got, want), (got_grads, want_grads) = zip(*results)
  assert got[1].dtype == np.float32
  assert op_cases.distance(got[1], want[1]) <= 1e-5
  assert op_cases.distance(got_grads, want_grads) <= 1e-4


def test_scores_are_fp32_for_bf16():
  arrays = _arrays(9, 4, jnp.bfloat16)
  got = attention.attend(*arrays)
  want = attention.attend(*(x.astype(jnp.float32) for x in arrays))
  assert got.dtype == jnp.bfloat16
  assert op_cases.distance(got.astype(jnp.float32), want) <= 1e-2


def test_products_of_turned_vectors_depend_on_the_distance_alone():
  q, k = (jax.random.normal(jax.random.key(i), (1, 1, 2, 8)) for i in range(2))
  at = lambda n: jnp.full((1, 1), n, jnp.int32)
  score = lambda i, j: jnp.sum(rotary.rotate(q, at(i)) * rotary.rotate(k, at(j)), axis=-1)
  assert op_cases.distance(score(9, 4), score(105, 100)) <= 1e-5
  assert op_cases.distance(score(9, 4), score(9, 5)) > 1e-2
  assert op_cases.distance(rotary.rotate(q, at(0)), q) == 0
  # Halves are paired: component 0 turns with component D/2, by one radian a token.
  one = jnp.zeros((1, 1, 1, 8)).at[..., 0].set(1)
  want = jnp.zeros(8).at[0].set(jnp.cos(3.0)).at[4].set(jnp.sin(3.0))
  assert op_cases.distance(rotary.rotate(one, at(3))[0, 0, 0], want) <= 1e-6


def _mixer(**knobs):
  module = mixers.get("attention")
  return module.Mixer(WIDTH, HEADS, module.Config(**knobs), rngs=nnx.Rngs(0))


def _x(length=T, batch=2):
  return jax.random.normal(jax.random.key(1), (batch, length, WIDTH))


_run = nnx.jit(lambda mixer, x, state=None, ids=None: mixer(x, state, segment_ids=ids))


def _pieces(mixer, x, sizes):
  outs, state = [], None
  for size in sizes:
    out, state = _run(mixer, x[:, :size], state)
    outs, x = [*outs, out], x[:, size:]
  return jnp.concatenate(outs, axis=1), state


@pytest.mark.parametrize(
  "knobs",
  [
    dict(num_kv_heads=2, conv_taps=3),
    dict(num_kv_heads=1, rope_base=0.0, gate="silu", post_norm="head_rms"),
    dict(window=1, cache_length=7),
    dict(window=4),
    dict(window=4, cache_length=3),
  ],
  ids=str,
)
def test_splits_and_packing_are_exact(knobs):
  mixer, x = _mixer(**knobs), _x()
  y, state = _run(mixer, x)
  for sizes in ((1,) * T, (5, 9), (2, 1, 11)):
    got, got_state = _pieces(mixer, x, sizes)
    assert op_cases.distance(got, y) <= 1e-5
    assert op_cases.distance(got_state, state) <= 1e-5
  # Rows that end at different places, then go on, in the segment or in a new one.
  ids = jnp.asarray([[0, 4, 0, 4, 4, 5, 5] + [5] * 7, [3] * 8 + [0] * 3 + [3, 2, 0]])
  first, state = _run(mixer, x[:, :7], None, ids[:, :7])
  second, state = _run(mixer, x[:, 7:], state, ids[:, 7:])
  whole, whole_state = _run(mixer, x, None, ids)
  assert op_cases.distance(jnp.concatenate([first, second], axis=1), whole) <= 1e-5
  assert op_cases.distance(state, whole_state) <= 1e-5
  alone, _ = _run(mixer, x[:1, 5:])
  assert op_cases.distance(whole[:1, 5:], alone) <= 1e-5
  shapes = lambda tree: [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]
  assert shapes(mixer.init_state(2)) == shapes(state)


def test_a_full_cache_answers_from_its_last_tokens():
  mixer, x = _mixer(cache_length=5), _x()
  _, state = _run(mixer, x[:, :10])
  got, _ = _run(mixer, x[:, 10:11], state)
  # Rotary scores do not see where a text begins, so the tokens before it might not have been.
  want, _ = _run(mixer, x[:, 5:11])
  whole, _ = _run(mixer, x[:, :11])
  assert op_cases.distance(got, want[:, -1:]) <= 1e-5
  assert op_cases.distance(got, whole[:, -1:]) > 1e-3
  # A window of one token more than the cache holds is the same, in one call too.
  windowed, _ = _run(_mixer(cache_length=5, window=6), x[:, :11])
  assert op_cases.distance(got, windowed[:, -1:]) <= 1e-5


def test_a_restart_hides_the_cache_from_later_calls():
  mixer, x = _mixer(), _x()
  ids = jnp.full((2, 3), 9, jnp.int32)
  _, state = _run(mixer, x[:, :6], None, jnp.full((2, 6), 4, jnp.int32))
  first, state = _run(mixer, x[:, 6:9], state, ids)
  second, _ = _run(mixer, x[:, 9:], state)
  want, _ = _run(mixer, x[:, 6:])
  assert op_cases.distance(jnp.concatenate([first, second], axis=1), want) <= 1e-5


def test_gradients_reach_the_cache():
  mixer, x = _mixer(num_kv_heads=2), _x(6)

  def loss(x, split):
    if not split:
      return jnp.sum(mixer(x)[0][:, 3:] ** 2)
    return jnp.sum(mixer(x[:, 3:], mixer(x[:, :3])[1])[0] ** 2)

  grads = [jax.jit(jax.grad(loss), static_argnums=1)(x, split) for split in (True, False)]
  assert op_cases.distance(*grads) <= 1e-5


def test_flops_count_the_pairs_that_see_each_other():
  pairs = lambda window, length: _mixer(window=window).mix_flops(length) // (4 * WIDTH)
  naive = lambda window, length: sum(min(t + 1, window or length) for t in range(length))
  for window, length in ((0, 9), (4, 9), (4, 3), (1, 5)):
    assert pairs(window, length) == naive(window, length)


@pytest.mark.parametrize(
  ("knobs", "message"),
  [
    (dict(num_kv_heads=3), "num_kv_heads=3 is not accepted; it must divide num_heads=4"),
    (dict(head_dim=3, value_dim=3), "head_dim=3 is not accepted; rotary positions take an even"),
    (dict(value_dim=6), "value_dim=6 is not accepted; it must be head_dim=4"),
    (dict(window=-1), "window=-1 is not accepted; it must be >= 0"),
    (dict(cache_length=-1), "cache_length=-1 is not accepted"),
  ],
)
def test_bad_knobs_are_one_sentence(knobs, message):
  with pytest.raises(ValueError, match=message):
    _mixer(**knobs)


def test_bad_calls_are_one_sentence():
  with pytest.raises(ValueError, match="head_dim=5 is odd; rotary positions take an even one"):
    rotary.rotate(jnp.zeros((1, 2, 1, 5)), jnp.zeros((1, 2), jnp.int32))
  with pytest.raises(
    ValueError, match=r"implementation='tpu' is unknown .* accepted are xla, cudnn"
  ):
    _mixer()(_x(), implementation="tpu")

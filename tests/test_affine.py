"""The affine recurrences in chunks are their token-by-token definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest

from trellis_jax.ops import affine_reference
from trellis_jax.ops.affine import affine, flops

jax.config.update("jax_numpy_rank_promotion", "raise")

# decay, delta
KINDS = [
  ("none", False),
  ("none", True),
  ("scalar", False),
  ("scalar", True),
  ("key", False),
  ("value", False),
]
B, T, H, K, V = 2, 37, 2, 5, 7
FORWARD, GRADIENTS = 1e-5, 1e-4
RUN = jnp.asarray([[0] * 5 + [1] * 9 + [2] * 23, [0] * 37], jnp.int32)


def _inputs(decay, delta, t=T, seed=0, dtype=np.float64):
  """Returns {q, k, w, log_decay, beta, initial} without None."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape)
  x = dict(q=normal(B, t, H, K), k=normal(B, t, H, K), w=normal(B, t, H, V))
  x["k"] /= np.linalg.norm(x["k"], axis=-1, keepdims=True)
  x["initial"] = normal(B, H, K, V)
  width = {"scalar": (), "key": (K,), "value": (V,)}.get(decay)
  if width is not None:
    # From none to 1e-6 per token.
    x["log_decay"] = -np.exp(rng.uniform(np.log(1e-3), np.log(14), size=(B, t, H, *width)))
  if delta:
    x["beta"] = rng.uniform(size=(B, t, H))
  return {name: jnp.asarray(a, dtype) for name, a in x.items()}


def _definition(x, axis, run=None):
  restart = None if run is None else run != jnp.pad(run[:, :-1], ((0, 0), (1, 0)))
  tokens = (x["q"], x["k"], x["w"], x.get("log_decay"), x.get("beta"))
  return affine_reference.forward(*tokens, x["initial"], axis=axis, restart=restart)


def _axis(decay):
  return "value" if decay == "value" else "key"


def _value_and_grads(call, x):
  return jax.jit(jax.value_and_grad(lambda x: op_cases.scalar(*call(x))))(x)


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("run", [None, RUN], ids=["whole", "restarts"])
@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_chunks_are_the_definition(decay, delta, run, bits):
  with jax.enable_x64(True):
    x = _inputs(decay, delta)
    define = functools.partial(_definition, axis=_axis(decay), run=run)
    want, want_grads = jax.jit(define)(x), _value_and_grads(define, x)[1]
    x = {n: a.astype(f"float{bits}") for n, a in x.items()}
    call = lambda x: affine(**x, decay_axis=_axis(decay), run=run, chunk_size=16)
    got = jax.jit(call)(x)
    assert all(a.dtype == f"float{bits}" for a in got)
    tight = 1e-7 if bits == 64 else 1
    assert op_cases.distance(got, want) <= FORWARD * tight
    assert op_cases.distance(_value_and_grads(call, x)[1], want_grads) <= GRADIENTS * tight


@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_any_split_and_any_chunk_is_exact(decay, delta):
  x = _inputs(decay, delta, dtype=np.float32)
  axis = dict(decay_axis=_axis(decay))
  o, end = jax.jit(lambda x: affine(**x, run=RUN, **axis))(x)
  state = x.pop("initial")
  outs, before = [], jnp.zeros((B,), jnp.int32)
  for start, stop in ((0, 1), (1, 8), (8, 36), (36, 37)):
    part = {n: a[:, start:stop] for n, a in x.items()}
    run = RUN[:, start:stop] - before[:, None]
    before = RUN[:, stop - 1]
    out, state = affine(**part, initial=state, run=run, chunk_size=8, **axis)
    outs.append(out)
  assert op_cases.distance((jnp.concatenate(outs, axis=1), state), (o, end)) <= FORWARD


@pytest.mark.parametrize(("decay", "delta"), KINDS[2:])
def test_long_and_steep_decays_are_finite(decay, delta):
  x = {n: a[:1] for n, a in _inputs(decay, delta, t=4096, dtype=np.float32).items()}
  axis = _axis(decay)
  call = jax.jit(lambda x: affine(**x, decay_axis=axis))
  grad = jax.jit(jax.grad(lambda x: op_cases.scalar(*affine(**x, decay_axis=axis))))
  for log in (np.log(1e-6), -np.inf, -1e-4):
    x["log_decay"] = jnp.full_like(x["log_decay"], log)
    out = call(x)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves((out, grad(x))))
    with jax.enable_x64(True):
      wide = {n: a.astype(jnp.float64) for n, a in x.items()}
      want = jax.jit(functools.partial(_definition, axis=axis))(wide)
    assert op_cases.distance(out, want) <= FORWARD


def test_alike_keys_at_full_strength_do_not_cancel():
  x = _inputs("none", True, t=200, dtype=np.float32)
  x["k"] = jnp.broadcast_to(x["k"][:, :1], x["k"].shape) + 1e-3 * x["k"]
  x["k"] = x["k"] / jnp.linalg.norm(x["k"], axis=-1, keepdims=True)
  x["beta"] = jnp.ones_like(x["beta"])
  call = lambda x: affine(**x)
  define = functools.partial(_definition, axis="key")
  assert op_cases.distance(call(x), define(x)) <= FORWARD
  got, want = _value_and_grads(call, x)[1], _value_and_grads(define, x)[1]
  assert op_cases.distance(got, want) <= GRADIENTS


@pytest.mark.parametrize("decay", ["key", "value"])
def test_the_gradient_of_longer_chunks_has_no_more_pads(decay):
  # XLA's CPU compiler takes minutes over sums of pads: one per level and array once did.
  x = _inputs(decay, False, t=128, dtype=np.float32)

  def pads(chunk_size):
    call = lambda x: affine(**x, decay_axis=decay, chunk_size=chunk_size)
    grad = jax.jit(jax.grad(lambda x: op_cases.scalar(*call(x))))
    return grad.lower(x).as_text().count("stablehlo.pad")

  assert pads(64) == pads(4)


def test_bf16_inputs_are_computed_in_fp32():
  x = {n: a.astype(jnp.bfloat16) for n, a in _inputs("scalar", True, dtype=np.float32).items()}
  o, end = affine(**x)
  wide = affine(**{n: a.astype(jnp.float32) for n, a in x.items()})
  assert o.dtype == jnp.bfloat16 and end.dtype == jnp.float32
  assert op_cases.distance(end, wide[1]) <= 1e-6 and op_cases.distance(o, wide[0]) <= 4e-3


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(chunk_size=48), "chunk_size=48 is not accepted; it must be a power of two"),
    (dict(decay_axis="both"), "decay_axis='both' is unknown; accepted are key, value"),
    (dict(log_decay=jnp.zeros((B, T, H, 3))), r"log_decay has shape .*must be \(2, 37, 2, 5\)"),
    (dict(beta=jnp.zeros((B, T, H)), log_decay=jnp.zeros((B, T, H, K))), "beta goes with one"),
    (dict(initial=jnp.zeros((B, H, V, K))), r"initial has shape .*must be \(2, 2, 5, 7\)"),
  ],
  ids=str,
)
def test_refusals_are_one_sentence(change, message):
  x = _inputs("none", False, dtype=np.float32)
  with pytest.raises(ValueError, match=message):
    affine(**(x | change))


def test_flops_are_counted():
  assert flops(128, 2, 8, 4, chunk_size=64) == 2 * 128 * 2 * (2 * 8 * 4 + 64 * 12 // 2)
  more = flops(128, 2, 8, 4, chunk_size=64, delta=True)
  assert more > flops(128, 2, 8, 4, chunk_size=64)

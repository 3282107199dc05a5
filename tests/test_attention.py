"""`TrellisAttention` in the place of `nnx.MultiHeadAttention`."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from flax import nnx

from trellis_jax import TrellisAttention
from trellis_jax.mixers.trellis import Config

jax.config.update("jax_numpy_rank_promotion", "raise")

B, T, H, F = 2, 7, 2, 8
SMALL = dict(num_heads=H, in_features=F, num_slots=4, chunk_size=4)
X = jax.random.normal(jax.random.key(7), (B, T, F))
TOKEN = X[:, :1]  # One token compiles in a fraction of the time of several.


def build(**kw):
  return TrellisAttention(**(SMALL | kw), rngs=nnx.Rngs(0))


@functools.partial(nnx.jit, static_argnames=("decode", "deterministic", "return_state"))
def run(layer, x, decode=None, deterministic=None, return_state=False, **arrays):
  static = dict(decode=decode, deterministic=deterministic, return_state=return_state)
  return layer(x, **static, **arrays)


def close(a, b, **tolerance):
  np.testing.assert_allclose(a, b, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))


# The interface.


def test_signatures_are_those_of_multi_head_attention():
  ours, theirs = (
    inspect.signature(c.__init__).parameters for c in (TrellisAttention, nnx.MultiHeadAttention)
  )
  positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
  assert [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
  assert set(theirs) <= set(ours)
  ours, theirs = (
    inspect.signature(c.__call__).parameters for c in (TrellisAttention, nnx.MultiHeadAttention)
  )
  assert list(ours)[:8] == list(theirs)[:8]
  assert set(theirs) - set(ours) == {"out_sharding", "qkv_sharding"}  # The op's shard_map's.


def test_defaults_are_those_of_the_config():
  default = nnx.eval_shape(lambda: TrellisAttention(H, F, rngs=nnx.Rngs(0)))
  assert default.mixer.config == Config()
  knobs = dict(phi="silu", target="linear", post_norm="none", head_dim=3, value_dim=5)
  config = nnx.eval_shape(lambda: build(**knobs)).mixer.config
  assert dataclasses.asdict(config) == dataclasses.asdict(Config()) | knobs | {
    "num_slots": 4,
    "chunk_size": 4,
  }


@pytest.mark.parametrize(
  "sizes, dtypes",
  [
    ({}, {}),
    (dict(qkv_features=12, out_features=6), dict(dtype=jnp.bfloat16)),
    (dict(out_features=3), dict(param_dtype=jnp.bfloat16)),
  ],
)
def test_shapes_and_dtypes_are_those_of_multi_head_attention(sizes, dtypes):
  kw = sizes | dtypes | {"decode": False}
  theirs = nnx.eval_shape(lambda: nnx.MultiHeadAttention(H, F, **kw, rngs=nnx.Rngs(0)))
  ours = nnx.eval_shape(lambda: build(**kw))
  x = jax.ShapeDtypeStruct(X.shape, dtypes.get("param_dtype", X.dtype))
  want, got = (nnx.eval_shape(lambda layer, x: layer(x), layer, x) for layer in (theirs, ours))
  assert (got.shape, got.dtype) == (want.shape, want.dtype)
  for name in ("num_heads", "in_features", "qkv_features", "out_features", "head_dim"):
    assert getattr(ours, name) == getattr(theirs, name)
  theirs, ours = (
    {v.dtype for v in jax.tree.leaves(nnx.state(m, nnx.Param))} for m in (theirs, ours)
  )
  assert ours == theirs


def test_it_is_the_mixer():
  layer = build(phi="silu")
  y, state = run(layer, X, return_state=True)
  want, want_state = nnx.jit(lambda mixer, x: mixer(x))(layer.mixer, X)
  jax.tree.map(np.testing.assert_array_equal, (y, state), (want, want_state))
  for inputs in ((X, None), (X, X), (X, X, X)):
    assert jax.eval_shape(lambda: layer(*inputs)).shape == y.shape


def test_any_number_of_batch_axes():
  layer = build()
  close(run(layer, X[0]), run(layer, X)[0])
  mask = jnp.broadcast_to(jnp.arange(T) < 5, (B, T))
  y, state = run(layer, X.reshape(1, B, T, F), mask=mask[None, :, None, None], return_state=True)
  want, want_state = run(layer, X, mask=mask, return_state=True)
  close(y[0], want)
  jax.tree.map(close, state, want_state)


def test_bfloat16_follows_float32():
  layer, narrow = build(), build(dtype=jnp.bfloat16)
  y, state = run(narrow, X, return_state=True)
  assert y.dtype == jnp.bfloat16
  assert state.memory.memory_k.dtype == jnp.float32
  # A token whose read nearly cancels can hold all of the error, hence the median over inputs.
  inputs = jax.random.normal(jax.random.key(7), (5, *X.shape))
  error = lambda x: op_cases.distance(run(narrow, x), run(layer, x))
  assert np.median([error(x) for x in inputs]) < 0.05


# Causality and gradients.


def test_no_output_has_a_gradient_in_later_inputs():
  layer = build()
  graph, params = nnx.split(layer)
  rows = jax.jit(jax.jacobian(lambda x: jnp.sum(nnx.merge(graph, params)(x[None])[0], axis=-1)))
  seen = np.any(np.asarray(rows(X[0])) != 0, axis=-1)
  np.testing.assert_array_equal(seen, np.tri(T, dtype=bool))


def test_every_parameter_has_a_gradient():
  layer = build(initial_memory="learned", use_bias=True)
  grads = nnx.jit(nnx.grad(lambda layer, x: jnp.sum(layer(x) ** 2)))(layer, X)
  for path, grad in nnx.to_flat_state(grads):
    assert np.all(np.isfinite(grad[...])) and np.any(grad[...]), path


# Padding and segments.


def test_padding_is_as_if_it_were_not_there():
  layer = build(use_bias=True, bias_init=nnx.initializers.ones)
  live = jnp.array([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]], bool)
  mask = np.tri(T, dtype=bool) & np.asarray(live)[:, None, None]
  y, state = nnx.jit(lambda layer, x: layer(x, mask=mask, return_state=True))(layer, X)
  np.testing.assert_array_equal(y[~live], 0)
  rows = jnp.stack([X[0, :5], X[1, 2:]])
  want, want_state = run(layer, rows, return_state=True)
  close(y[live].reshape(2, 5, F), want)
  jax.tree.map(close, state, want_state)
  np.testing.assert_array_equal(run(layer, X, mask=live), y)


def test_a_padded_token_alone_changes_nothing():
  layer = build(use_bias=True, bias_init=nnx.initializers.ones)
  _, state = run(layer, X, return_state=True)
  mask = jnp.array([[True], [False]])
  y, after = run(layer, TOKEN, initial_state=state, mask=mask, return_state=True)
  np.testing.assert_array_equal(y[1], 0)
  row = lambda state, i: jax.tree.map(lambda x: x[i], state)
  jax.tree.map(np.testing.assert_array_equal, row(after, 1), row(state, 1))
  close(y[0], run(layer, TOKEN, initial_state=state)[0])


def test_a_mask_goes_on_in_the_segment_of_the_state():
  layer = build(use_bias=True, bias_init=nnx.initializers.ones)
  _, state = run(layer, X, return_state=True)
  memory = dataclasses.replace(state.memory, segment=jnp.array([9, 4], jnp.int32))
  state = dataclasses.replace(state, memory=memory)
  y, _ = run(layer, TOKEN, initial_state=state, mask=jnp.ones((B, 1), bool), return_state=True)
  close(y, run(layer, TOKEN, initial_state=state))


def test_masks_and_segments_combine():
  layer = build()
  ids = jnp.array([[1, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 8, 8]])
  live = jnp.array([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]], bool)
  y = run(layer, X, segment_ids=ids, mask=live)
  np.testing.assert_array_equal(y, run(layer, X, segment_ids=jnp.where(live, ids, 0)))
  assert np.max(np.abs((y - run(layer, X))[:, :6])) > 1e-3


# State and cache.


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("pieces", [(1,) * T, (3, 1, 3)])
def test_decoding_in_pieces_is_one_call(chunk_size, pieces):
  layer = build(chunk_size=chunk_size)
  want, want_state = run(layer, X, return_state=True)
  state, ys = layer.init_state(X.shape), []
  for x in jnp.split(X, np.cumsum(pieces)[:-1], axis=1):
    y, state = run(layer, x, initial_state=state, return_state=True)
    ys.append(y)
  close(jnp.concatenate(ys, axis=1), want)
  jax.tree.map(close, state, want_state)


@pytest.mark.parametrize("knobs", [{}, dict(v_conv=True, alpha_conv=True)], ids=str)
def test_decoding_from_the_cache_is_one_call(knobs):
  layer = build(**knobs)
  layer.init_cache(X.shape)
  ys = [run(layer, x, decode=True) for x in jnp.split(X, [3, 4, 5, 6], axis=1)]
  close(jnp.concatenate(ys, axis=1), run(layer, X))


def _shapes(layer):
  cache = nnx.to_flat_state(nnx.state(layer, nnx.Cache))
  return {path: (v.shape, v.dtype) for path, v in cache}


def test_the_cache_does_not_grow():
  layer = build()
  layer.init_cache((B, 100_000, F))
  long = _shapes(layer)
  layer.init_cache((B, 1, F))
  assert _shapes(layer) == long
  run(layer, TOKEN, decode=True)
  assert _shapes(layer) == long
  assert sum(np.prod(shape) for shape, _ in long.values()) == B * (layer.mixer.state_size() + 2)


def test_init_cache_clears_and_takes_a_dtype():
  layer = build(decode=True, dtype=jnp.bfloat16)
  layer.init_cache(X.shape, jnp.bfloat16)
  first = run(layer, TOKEN)
  assert np.any(np.asarray(run(layer, TOKEN) != first))
  layer.init_cache(X.shape, jnp.bfloat16)
  np.testing.assert_array_equal(run(layer, TOKEN), first)
  assert layer.cache.taps.dtype == jnp.bfloat16
  assert layer.cache.memory.memory_v.dtype == jnp.float32


def test_the_dtype_of_a_cache_is_that_of_all_convolutions():
  layer = build(decode=True, v_conv=True, alpha_conv=True)
  layer.init_cache(X.shape, jnp.bfloat16)
  of = lambda: [getattr(layer.cache, n).dtype for n in ("taps", "v_taps", "alpha_taps")]
  assert of() == [jnp.bfloat16] * 3
  run(layer, TOKEN)
  assert of() == [jnp.bfloat16] * 3 and layer.cache.memory.memory_k.dtype == jnp.float32


def test_jit_drops_what_nnx_jit_keeps():
  layer = build(decode=True)
  layer.init_cache(X.shape)
  dropped = jax.jit(lambda layer, x: layer(x))
  first = dropped(layer, TOKEN)
  np.testing.assert_array_equal(dropped(layer, TOKEN), first)
  close(run(layer, TOKEN), first)
  assert np.max(np.abs(run(layer, TOKEN) - first)) > 1e-3
  graph, params = nnx.split(build())
  step = jax.jit(
    lambda x, s: nnx.merge(graph, params)(x, initial_state=s, return_state=True), donate_argnums=1
  )
  layer.init_cache(X.shape)
  state = jax.tree.map(jnp.copy, layer.init_state(X.shape))
  for _ in range(2):
    y, state = step(TOKEN, state)
    close(y, run(layer, TOKEN))


def test_a_cache_starts_from_the_initial_memory_of_today():
  layer = build(initial_memory="learned", memory_std=1.0)
  layer.init_cache(X.shape)
  layer.mixer.memory_v[...] *= 2
  want = run(layer, TOKEN)
  close(run(layer, TOKEN, decode=True), want)
  after = run(layer, TOKEN, decode=True)
  assert np.max(np.abs(after - want)) > 1e-3
  jax.tree.map(
    lambda c: c.set_value(jnp.zeros_like(c[...])),
    layer.cache,
    is_leaf=lambda c: isinstance(c, nnx.Variable),
  )
  close(run(layer, TOKEN, decode=True), want)


def test_views_set_modes():
  layer = build(dropout_rate=0.5)
  want = run(nnx.view(layer, deterministic=True), TOKEN)
  view = nnx.view(layer, deterministic=True, decode=True, batch_size=B, max_length=50)
  close(run(view, TOKEN), want)
  assert layer.decode is None and layer.cache is None


# Keywords.


def test_initialisers_reach_the_maps():
  ones, zeros = nnx.initializers.ones, nnx.initializers.zeros
  mixer = build(kernel_init=ones, out_kernel_init=zeros, use_bias=True, bias_init=ones).mixer
  for part in (mixer.qk, mixer.v, mixer.alpha, mixer.output.gate):
    np.testing.assert_array_equal(part.kernel[...], 1)
    np.testing.assert_array_equal(part.bias[...], 1)
  np.testing.assert_array_equal(mixer.output.out.kernel[...], 0)
  np.testing.assert_array_equal(mixer.output.out.bias[...], 1)
  assert mixer.gates.bias is None
  assert build().mixer.output.out.bias is None
  mixer = build(kernel_init=ones, use_bias=True, out_bias_init=ones).mixer
  np.testing.assert_array_equal(mixer.output.out.kernel[...], 1)
  np.testing.assert_array_equal(mixer.qk.bias[...], 0)


def test_metadata_and_functions_reach_the_maps():
  called = []

  def dot_general(*args, **kw):
    called.append(kw["precision"])
    return jax.lax.dot_general(*args, **kw)

  layer = build(
    kernel_metadata={"role": "in"},
    out_kernel_metadata={"role": "out"},
    out_dot_general=dot_general,
    precision="highest",
  )
  jax.eval_shape(layer, X)
  assert called == ["highest"]
  assert layer.mixer.v.kernel.role == "in" and layer.mixer.output.out.kernel.role == "out"
  assert layer.mixer.precision == "highest"


@pytest.mark.parametrize("broadcast", [False, True])
def test_dropout_is_of_the_outputs(broadcast):
  x = X.reshape(B * T, 1, F)
  layer = build(dropout_rate=0.5, broadcast_dropout=broadcast, deterministic=False)
  whole = run(build(), x)
  dropped = np.asarray(run(layer, x) == 0)
  assert 0 < dropped.mean() < 1
  assert np.all(dropped == dropped[:1]) == broadcast
  np.testing.assert_array_equal(run(layer, x, deterministic=True), whole)
  y, again = (run(layer, x, rngs=nnx.Rngs(dropout=3)) for _ in range(2))
  np.testing.assert_array_equal(y, again)
  close(y[y != 0], 2 * whole[y != 0])
  assert np.any(np.asarray(run(layer, x) != y))


def test_dropout_asks_for_what_it_needs():
  with pytest.raises(ValueError, match="deterministic"):
    build(dropout_rate=0.5)(X)
  with pytest.raises(ValueError, match="rngs"):
    build(dropout_rate=0.5, keep_rngs=False)(X, deterministic=False)


# What can be seen.


@nnx.jit
def sown(layer, x, **arrays):
  """Returns (outputs, what the call sows by name)."""
  call = nnx.capture(lambda layer: layer(x, sow_weights=True, **arrays), nnx.Intermediate)
  y, captured = call(layer)
  return y, {path[-1]: value.get_value()[0] for path, value in nnx.to_flat_state(captured)}


def test_what_is_sown():
  layer = build()
  live = jnp.array([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]], bool)
  y, trace = sown(layer, X.reshape(1, B, T, F), mask=live[None])
  want, state = run(layer, X, mask=live, return_state=True)
  close(y[0], want)
  with jax.disable_jit():  # Operation by operation nothing depends on what a compiler fuses.
    np.testing.assert_array_equal(sown(layer, TOKEN)[0], run(layer, TOKEN))
  per_token = {"forget_gate", "step_size", "target_norm", "write_k", "write_v"}
  per_token |= {f"loss_{when}_{which}" for when in ("before", "after") for which in "kv"}
  at_end = {f"{what}_{which}" for what in ("norm", "rank") for which in "kv"}
  assert set(trace) == per_token | at_end
  for name, value in trace.items():
    assert value.shape == ((1, B, T, H) if name in per_token else (1, B, H))
  (*_, log_beta, gamma), _ = layer.mixer.op_inputs(X)
  close(trace["forget_gate"][0][live], jnp.exp(log_beta)[live])
  close(trace["step_size"][0][live], gamma[live])
  np.testing.assert_array_equal(trace["loss_before_k"][0][~live], 0)
  close(trace["norm_v"][0], jnp.sqrt(jnp.sum(state.memory.memory_v**2, axis=(-2, -1))))
  # Without being asked the layer sows nothing.
  quiet = nnx.capture(lambda layer: jax.eval_shape(layer, X), nnx.Intermediate)
  assert not nnx.to_flat_state(quiet(layer)[1])


def test_what_is_sown_goes_on_from_the_state():
  layer = build()
  _, whole = sown(layer, X)
  start = layer.init_state(X.shape)
  _, state = run(layer, X[:, :3], initial_state=start, return_state=True)
  _, rest = sown(layer, X[:, 3:], initial_state=state)
  for name in ("loss_before_k", "loss_after_v"):
    close(rest[name], whole[name][:, 3:])
  close(rest["norm_k"], whole["norm_k"])


# Refusals.

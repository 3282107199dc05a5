"""`trellis_jax.linen.TrellisAttention`: the nnx layer as a Linen module."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import trellis_jax
from trellis_jax.linen import TrellisAttention

jax.config.update("jax_numpy_rank_promotion", "raise")
# The bridge warns of variables that it cannot place.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")

B, T, F = 2, 6, 8
SMALL = dict(num_heads=2, num_slots=4, chunk_size=1)
X = jax.random.normal(jax.random.key(7), (B, T, F))


class Block(nn.Module):
  """One layer of `Stack`."""

  decode: bool = False

  @nn.compact
  def __call__(self, x, _):
    return x + TrellisAttention(**SMALL, decode=self.decode, name="mix")(x), None


class Stack(nn.Module):
  """Three layers, rematerialised in a scan."""

  decode: bool = False

  @nn.compact
  def __call__(self, x):
    axes = {"params": 0, "cache": 0}
    blocks = nn.scan(nn.remat(Block), axes, split_rngs={"params": True}, length=3)
    return blocks(self.decode, name="blocks")(x, None)[0]


@functools.partial(jax.jit, static_argnums=0)
def init(module, x, seed=1):
  return module.init(jax.random.key(seed), x)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("mutable", "sow_weights"))
def run(module, variables, x, rngs=None, **kw):
  return module.apply(variables, x, rngs=rngs, **kw)


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_it_is_the_nnx_layer():
  nnx_layer = trellis_jax.TrellisAttention(
    **SMALL, in_features=F, out_features=3, phi="silu", rngs=nnx.Rngs(0)
  )
  layer = TrellisAttention(**SMALL, out_features=3, knobs={"phi": "silu"})
  params = nnx.to_pure_dict(nnx.state(nnx_layer, nnx.Param))
  assert jax.tree.structure(init(layer, X)["params"]) == jax.tree.structure(params)
  want = nnx.jit(lambda layer, x: layer(x))(nnx_layer, X)
  np.testing.assert_array_equal(run(layer, {"params": params}, X), want)


def test_fields_and_arguments_are_those_of_the_nnx_layer():
  nnx_fields = inspect.signature(trellis_jax.TrellisAttention.__init__).parameters
  for field in dataclasses.fields(TrellisAttention):
    if field.name not in ("parent", "name", "num_heads", "knobs", "decode"):
      assert field.default == nnx_fields[field.name].default, field.name
  ours, theirs, nnx_call = (
    list(inspect.signature(c.__call__).parameters)
    for c in (TrellisAttention, nn.MultiHeadDotProductAttention, trellis_jax.TrellisAttention)
  )
  assert set(theirs) - set(ours) == {"inputs_kv"}
  assert set(nnx_call) - set(ours) == {"rngs", "decode"}


def test_scan_and_remat_run_the_layers_in_turn():
  variables = init(Stack(), X)
  params = variables["params"]["blocks"]["mix"]
  assert params["mixer"]["qk"]["kernel"].shape == (3, F, F)
  x = X
  for i in range(3):
    x = x + run(TrellisAttention(**SMALL), {"params": jax.tree.map(lambda p: p[i], params)}, x)
  close(run(Stack(), variables, X), x)
  kernel = params["mixer"]["qk"]["kernel"]
  assert not np.allclose(kernel[0], kernel[1])


def test_gradients_pass_scan_and_remat():
  variables = init(Stack(), X)
  loss = lambda variables: jnp.sum(Stack().apply(variables, X) ** 2)
  for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(variables)):
    assert np.all(np.isfinite(grad)) and np.any(grad), path


def test_remat_of_the_layer_itself():
  variables = init(TrellisAttention(**SMALL), X)
  rematted = nn.remat(TrellisAttention)(**SMALL)
  close(run(rematted, variables, X), run(TrellisAttention(**SMALL), variables, X))


def test_decoding_in_pieces_is_one_call():
  variables = init(Stack(decode=True), X)
  params, cache, ys = variables["params"], variables["cache"], []
  sizes = jax.tree.map(lambda x: (x.shape, x.dtype), cache)
  for x in jnp.split(X, [1, 5], axis=1):
    y, kept = run(Stack(decode=True), {"params": params, "cache": cache}, x, mutable=("cache",))
    cache = kept["cache"]
    ys.append(y)
  close(jnp.concatenate(ys, axis=1), run(Stack(), {"params": params}, X))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == sizes


def test_a_call_without_a_cache_starts_one():
  layer = TrellisAttention(**SMALL)
  decoder = layer.clone(decode=True)
  variables = init(layer, X)
  first, kept = run(decoder, variables, X[:, :4], mutable=("cache",))
  rest, _ = run(decoder, {**variables, **kept}, X[:, 4:], mutable=("cache",))
  want = run(layer, variables, X)
  close(jnp.concatenate([first, rest], axis=1), want)
  # A cache that lies beside does not change a call that does not decode.
  np.testing.assert_array_equal(run(layer, {**variables, **kept}, X), want)


def test_a_cache_of_other_parameters_starts_from_the_layers_initial_memory():
  knobs = {"initial_memory": "learned", "memory_std": 1.0}
  layer = TrellisAttention(**SMALL, knobs=knobs)
  decoder = layer.clone(decode=True)
  cache = init(decoder, X)["cache"]
  params = init(layer, X, 2)["params"]
  y, _ = run(decoder, {"params": params, "cache": cache}, X, mutable=("cache",))
  close(y, run(layer, {"params": params}, X))


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")  # What the bridge reads.
def test_intermediates():
  layer = TrellisAttention(**SMALL)
  variables = init(layer, X)
  assert set(variables) == {"params"}
  sow = dict(sow_weights=True, mutable=("intermediates",))
  y, kept = run(layer, variables, X, **sow)
  close(y, run(layer, variables, X))
  with jax.disable_jit():  # Operation by operation nothing depends on what a compiler fuses.
    one = X[:, :1]
    np.testing.assert_array_equal(run(layer, variables, one, **sow)[0], run(layer, variables, one))
  (gate,) = kept["intermediates"]["forget_gate"]
  assert gate.shape == (B, T, 2) and np.all((gate > 0.9) & (gate < 1))
  assert {"loss_before_k", "loss_after_v", "norm_k"} <= set(kept["intermediates"])


def test_dropout_draws_from_its_stream_or_the_key():
  layer = TrellisAttention(**SMALL, dropout_rate=0.5, deterministic=False)
  token = X[:, :1]
  variables = init(TrellisAttention(**SMALL), X)
  a, b, again = (run(layer, variables, token, {"dropout": jax.random.key(s)}) for s in (0, 1, 0))
  np.testing.assert_array_equal(a, again)
  assert np.any(np.asarray(a != b))
  keys = jax.random.key(0), jax.random.key(1)
  c, d = (run(layer, variables, token, dropout_rng=key) for key in keys)
  assert np.any(np.asarray(c != d))


def test_refusals_are_those_of_the_nnx_layer():
  layer = TrellisAttention(**SMALL)
  variables = init(layer, X)
  with pytest.raises(ValueError, match=r"inputs_k of shape .* is not the array inputs_q"):
    layer.apply(variables, X, X + 1)
  with pytest.raises(ValueError, match="no knob 'slots'; accepted are num_slots"):
    TrellisAttention(2, knobs={"slots": 4}).init(jax.random.key(0), X)
  with pytest.raises(ValueError, match=r"apply with mutable=\['cache'\]"):
    layer.clone(decode=True).apply(variables, X)

"""The knobs of the mixers that tokens train: each runs, learns and starts where it says."""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from flax import nnx

from trellis_jax import mixers, sharding

jax.config.update("jax_numpy_rank_promotion", "raise")

WIDTH, H, T = 16, 2, 11
KNOBS = (
  ("trellis", dict(num_slots=5, v_activation="gelu", curvature=1.0)),
  ("trellis", dict(num_slots=5, v_conv=True, alpha_conv=True, value_dim=5, v_activation="silu")),
  ("ttt_linear", dict(rope=True)),
  ("ttt_linear", dict(learned_scale=False, conv_taps=1, head_dim=3, value_dim=3, chunk_size=1)),
  ("ttt_mlp", dict(expansion=2, gate="none", post_norm="none")),
  ("titans", dict(depth=1, value_dim=5, conv_taps=1)),
  ("titans", dict(depth=3, expansion=2, chunk_size=1)),
  ("lattice", dict(num_slots=5, code="softmax", v_norm="none")),
  ("lattice", dict(num_slots=5, value_dim=3, chunk_size=1, conv_taps=1)),
)


def _mixer(name, **knobs):
  config = mixers.configure(name, dict(chunk_size=4) | knobs)
  return mixers.get(name).Mixer(WIDTH, H, config, rngs=nnx.Rngs(0))


def _x(length=T):
  return jax.random.normal(jax.random.key(1), (2, length, WIDTH))


@pytest.mark.parametrize(("name", "knobs"), KNOBS, ids=str)
def test_knobs_run_split_and_every_parameter_learns(name, knobs):
  graph, params = nnx.split(_mixer(name, **knobs))
  x = _x()

  def loss(params, splits):
    outs, state = [], None
    for start, stop in zip((0, *splits), (*splits, T)):
      out, state = nnx.merge(graph, params)(x[:, start:stop], state)
      outs.append(out)
    out = jnp.concatenate(outs, axis=1)
    return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype).reshape(out.shape)))

  whole = jax.jit(jax.value_and_grad(lambda p: loss(p, ())))(params)
  pieces = jax.jit(lambda p: loss(p, (6,)))(params)
  assert op_cases.distance(pieces, whole[0]) <= 1e-4
  for path, grad in jax.tree_util.tree_leaves_with_path(whole[1]):
    assert np.all(np.isfinite(grad)) and np.any(np.asarray(grad) != 0), sharding.path_of(path)


def test_titans_gates_start_where_the_config_says():
  mixer = _mixer("titans", forget_init=0.03, momentum_init=0.8)
  start = jax.nn.sigmoid(mixer.gate_bias[...])
  np.testing.assert_allclose(start[:, 0], [(1 - 0.8) / 4, 0.8, 1 - 0.03], atol=1e-6)


def test_scales_of_a_mini_batch_are_those_of_a_mean():
  np.testing.assert_allclose(_mixer("ttt_mlp").scales(), 1 / np.arange(1, 5), rtol=1e-6)


def test_initial_networks_are_split_over_heads():
  mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "model"))
  spec = lambda m: sharding.param_specs(nnx.to_pure_dict(nnx.split(m)[1]), mesh)
  heads = lambda ndim: jax.sharding.PartitionSpec("model", *(None,) * (ndim - 1))
  ttt = spec(_mixer("ttt_mlp"))
  assert jax.tree.leaves(ttt["memory_weights"])[1] == heads(3)
  assert jax.tree.leaves(ttt["memory_biases"])[0] == heads(2)
  assert spec(_mixer("lattice"))["memory_slots"] == heads(3)


@pytest.mark.parametrize(
  ("name", "knobs", "message"),
  [
    ("ttt_linear", dict(value_dim=3), "value width 3 is not accepted; TTT needs head_dim=8"),
    ("ttt_mlp", dict(rope=True, head_dim=3, value_dim=3), "head_dim=3 .* rope needs an even one"),
    ("ttt_mlp", dict(expansion=0), "expansion=0 is not accepted; it must be >= 1"),
    ("titans", dict(forget_init=1.0), r"forget_init=1.0 is not accepted; it lies in \(0, 1\)"),
    ("titans", dict(step_init=2.0), r"step_init=2.0 .* \(0, step_scale=1.0\)"),
    ("lattice", dict(code="l1"), "code='l1' is unknown; accepted are l2, softmax"),
    ("lattice", dict(num_slots=0), "num_slots=0 is not accepted"),
  ],
)
def test_bad_knobs_are_one_sentence(name, knobs, message):
  with pytest.raises(ValueError, match=message):
    _mixer(name, **knobs)

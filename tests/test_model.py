"""The language model and its mixers: one contract for every file of the folder."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from flax import nnx

from trellis_jax import LM, LMConfig, mixers, sharding
from trellis_jax.mixers import trellis as trellis_mixer

jax.config.update("jax_numpy_rank_promotion", "raise")

# Knobs that a mixer takes if it has them: memories and chunks that 18 tokens fill more than once.
SMALL = dict(num_slots=6, chunk_size=4, state_dim=8, conv_taps=3)
VOCAB, T = 29, 18


def _small(mixer):
  fields = [f.name for f in dataclasses.fields(mixers.get(mixer).Config)]
  return {name: value for name, value in SMALL.items() if name in fields}


def _lm(mixer="trellis", num_layers=2, knobs=None, **kw):
  names = (mixer,) if isinstance(mixer, str) else mixer
  knobs = {name: _small(name) | (knobs or {}) for name in names}
  cfg = LMConfig(VOCAB, 16, num_layers, 2, mlp_width=24, mixer=mixer, mixers=knobs, **kw)
  return LM(cfg, rngs=nnx.Rngs(0))


def _tokens(batch=2, length=T):
  return jax.random.randint(jax.random.key(1), (batch, length), 0, VOCAB)


@pytest.fixture(scope="module", params=mixers.names())
def lm(request):
  return _lm(request.param)


_run = nnx.jit(lambda lm, tokens, state=None, ids=None: lm(tokens, state, segment_ids=ids))


def test_decode_and_any_split_equal_one_pass(lm):
  tokens = _tokens()
  logits, final = _run(lm, tokens)
  for pieces in (range(T), (0, 5, 16)):
    outs, state = [], None
    for start, stop in zip(pieces, (*list(pieces)[1:], T)):
      out, state = _run(lm, tokens[:, start:stop], state)
      outs.append(out)
    assert op_cases.distance(jnp.concatenate(outs, axis=1), logits) <= 1e-5
    assert op_cases.distance(state, final) <= 1e-5


def test_causality_by_gradients(lm):
  x = jax.random.normal(jax.random.key(2), (2, T, 16))
  mixer = lm.repeated[0].mixer
  graph, params = nnx.split(mixer)
  params = jax.tree.map(lambda p: p[0], params)
  early = lambda x: jnp.sum(nnx.merge(graph, params)(x)[0][:, :7] ** 2)
  grad = np.asarray(jax.jit(jax.grad(early))(x))
  assert np.all(grad[:, 7:] == 0) and np.any(grad[:, 6] != 0)


def test_packed_equals_separate_and_padding_does_not_exist(lm):
  tokens = _tokens(batch=1, length=22)
  ids = jnp.asarray([[0, 0] + [1] * 8 + [0] * 3 + [2] * 6 + [0] * 3])
  logits, state = _run(lm, tokens, None, ids)
  first, _ = _run(lm, tokens[:, 2:10])
  second, _ = _run(lm, tokens[:, 13:19])
  live = np.flatnonzero(ids[0])
  want, want_state = _run(lm, tokens[:, live], None, ids[:, live])
  assert op_cases.distance(logits[:, live], want) <= 1e-5
  assert op_cases.distance(state, want_state) <= 1e-5
  assert op_cases.distance(logits[:, 2:10], first) <= 1e-5
  # The second document starts on a chunk boundary, after 8 tokens: C = 4.
  assert op_cases.distance(logits[:, 13:19], second) <= 1e-5


def _loss(lm, tokens, **kw):
  """A loss of the parameters of an LM of lm's configuration but for `kw`, and its parameters."""
  other = LM(dataclasses.replace(lm.cfg, **kw), rngs=nnx.Rngs(0))
  graph, params = nnx.split(other)
  logits = lambda p: nnx.merge(graph, p)(tokens)[0]
  return lambda p: jnp.mean(jax.nn.log_softmax(logits(p))[..., 0]), params


def test_bf16_stays_close(lm):
  loss, params = _loss(lm, _tokens())
  narrow, _ = _loss(lm, _tokens(), dtype="bfloat16")
  assert op_cases.distance(jax.jit(narrow)(params), jax.jit(loss)(params)) <= 2e-2


def test_remat_changes_nothing(lm):
  # In fp64: in fp32 a compiler's order of sums alone moves some gradients by 1e-5.
  with jax.enable_x64(True):
    wide = dict(dtype="float64", param_dtype="float64")
    loss, params = _loss(lm, _tokens(), **wide)
    again, _ = _loss(lm, _tokens(), remat="full", **wide)
    both = lambda f: jax.jit(jax.value_and_grad(f))(params)
    assert op_cases.distance(both(again), both(loss)) <= 1e-10


def test_state_and_flops_are_counted(lm):
  state = lm.init_state(3)
  _, after = _run(lm, _tokens(batch=3))
  shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  assert shapes(state) == shapes(after)
  floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert sum(x.size for x in floats) == 3 * lm.state_size()
  matrices = [p for p in jax.tree.leaves(nnx.split(lm)[1]) if p.ndim >= 2]
  assert lm.flops(64) >= 2 * 64 * sum(p.size for p in matrices) * 0.9
  assert lm.flops(128) >= 2 * lm.flops(64)


def test_patterns_repeat_and_the_rest_follows():
  lm = _lm(mixer=("trellis", "trellis"), num_layers=5)
  assert len(lm.repeated) == 2 and len(lm.rest) == 1
  logits, state = _run(lm, _tokens())
  assert logits.shape == (2, T, VOCAB) and len(state[0]) == 2 and len(state[1]) == 1


def test_gates_of_the_built_model_start_where_the_config_says():
  lm = _lm(num_layers=3, knobs=dict(forget_init=0.98))
  x = jax.random.normal(jax.random.key(0), (2, 64, 16))
  graph, params = nnx.split(lm.repeated[0].mixer)
  for layer in range(3):
    mixer = nnx.merge(graph, jax.tree.map(lambda p: p[layer], params))
    (*_, log_beta, gamma), _ = mixer.op_inputs(x)
    assert abs(float(jnp.mean(jnp.exp(log_beta))) - 0.98) < 0.005
    assert abs(float(jnp.mean(gamma)) - 0.5) < 0.02


def test_the_first_loss_is_log_vocab():
  tokens = _tokens(batch=8)
  logits, _ = _lm()(tokens)
  nll = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1))
  assert abs(float(nll) - math.log(VOCAB)) < 0.1


@pytest.mark.parametrize("v_eps", [1e-6, 1.0])
def test_values_shorter_than_the_root_of_their_eps_are_written_as_they_are(v_eps):
  mixer = trellis_mixer.Mixer(8, 2, trellis_mixer.Config(v_eps=v_eps), rngs=nnx.Rngs(0))
  lengths = {}
  for size in (0.01, 100.0):
    (_, _, v, *_), _ = mixer.op_inputs(size * jnp.ones((1, 1, 8)))
    raw = jnp.linalg.norm(mixer.v(size * jnp.ones((1, 1, 8))).reshape(2, 4), axis=-1)
    np.testing.assert_allclose(
      jnp.linalg.norm(v[0, 0], axis=-1), raw / jnp.sqrt(raw**2 + v_eps), rtol=1e-5
    )
    lengths[size] = float(jnp.max(jnp.linalg.norm(v, axis=-1)))
  assert 0.99 < lengths[100.0] < 1 + 1e-6 and (lengths[0.01] < 0.1) == (v_eps == 1.0)


@pytest.mark.parametrize("v_eps", [0.0, -1.0, math.inf])
def test_an_eps_of_values_that_is_not_positive_is_refused(v_eps):
  with pytest.raises(ValueError, match=rf"v_eps={v_eps} is not accepted; it must be finite and > "):
    trellis_mixer.Config(v_eps=v_eps)


def test_forget_gates_by_rate_start_at_a_length_of_each_head():
  config = trellis_mixer.Config(forget_form="rate")
  mixer = trellis_mixer.Mixer(64, 32, config, rngs=nnx.Rngs(0))
  (*_, log_beta, _), _ = mixer.op_inputs(jnp.zeros((1, 1, 64)))
  dt, rate = jax.nn.softplus(mixer.forget_bias[...]), jnp.exp(mixer.log_rate[...])
  np.testing.assert_allclose(log_beta[0, 0], -rate * dt, rtol=1e-5)
  assert np.all((dt >= 0.999e-3) & (dt <= 0.1001)) and np.all((rate >= 0.0159) & (rate <= 16.01))
  lengths = -1 / np.asarray(log_beta[0, 0])
  assert lengths.min() < 10 and lengths.max() > 300


@pytest.mark.parametrize(
  "knobs",
  [
    dict(share_qk=False, conv_taps=1, target="linear", qk_norm="none", v_norm="none"),
    dict(forget_form="rate", conv_spread=0.5),
    dict(step_form="softplus", target="layer_norm", gate="none", post_norm="none"),
    dict(step_form="constant", forget=False, initial_memory="learned", value_dim=5),
    dict(head_dim=3, post_norm="head_rms", gate="silu", v_activation="gelu", chunk_size=1),
    dict(v_conv=True, alpha_conv=True, value_dim=5, v_activation="silu", v_eps=1.0),
  ],
  ids=str,
)
def test_knobs_run_and_every_parameter_learns(knobs):
  lm = _lm(knobs=knobs)
  graph, params = nnx.split(lm)
  tokens = _tokens()
  loss = lambda p: jnp.mean(jax.nn.log_softmax(nnx.merge(graph, p)(tokens)[0])[..., 3])
  grads = jax.jit(jax.grad(loss))(params)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.all(np.isfinite(grad)) and np.any(np.asarray(grad) != 0), sharding.path_of(path)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_one_after_the_other_are_the_scanned_ones(remat):
  results = []
  for scan_layers in (True, False):
    # Two repetitions of a pattern of two, and one layer more.
    lm = _lm(("trellis", "attention"), num_layers=5, remat=remat, scan_layers=scan_layers)
    graph, params = nnx.split(lm)

    def loss(params, graph=graph):
      lm, tokens = nnx.merge(graph, params), _tokens()
      first, state = lm(tokens[:, :5])
      rest, state = lm(tokens[:, 5:], state)
      logits = jnp.concatenate([first, rest], axis=1)
      return jnp.sum(jnp.sin(logits)), (logits, state)

    results.append(jax.jit(jax.grad(loss, has_aux=True))(params))
  (want_grads, want), (grads, got) = results
  assert jax.tree.structure(got) == jax.tree.structure(want)
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, (grads, got), (want_grads, want))


def test_the_literal_preset_differs_where_the_paper_is_literal():
  literal = mixers.get("trellis").Config.literal(num_slots=32)
  assert (literal.target, literal.phi_eps, literal.v_norm) == ("linear", 1e-5, "none")
  assert literal.num_slots == 32


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(num_heads=3), "width=16 does not divide into num_heads=3"),
    (dict(mixer="mamba9"), "mixer='mamba9' is unknown; accepted are .*trellis"),
    (dict(mixers={"trellis": {"slots": 3}}), "no knob 'slots'; accepted are num_slots"),
    (dict(mixers={"trellis": {"phi": "relu"}}), "phi='relu' is unknown"),
    (dict(mixers={"trellis": {"target": "none"}}), "target='none' is unknown; accepted are phi"),
    (dict(mixers={"trellis": {"step_init": 2.0}}), r"step_init=2.0 .* \(0, step_scale=1.0\)"),
    (dict(vocab_size=0), "vocab_size=0 is not accepted; it must be an integer >= 1"),
    (dict(remat="half"), "remat='half' is unknown; accepted are none, full, dots"),
    (dict(dtype="int8"), "dtype='int8' is unknown"),
  ],
)
def test_bad_configs_are_one_sentence(change, message):
  fields = dict(vocab_size=VOCAB, width=16, num_layers=1, num_heads=2) | change
  with pytest.raises(ValueError, match=message):
    LM(LMConfig(**fields), rngs=nnx.Rngs(0))


def test_parameters_are_split_where_they_divide():
  mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "model"))
  params = nnx.to_pure_dict(nnx.split(_lm())[1])
  specs = sharding.param_specs(params, mesh)
  P = jax.sharding.PartitionSpec
  assert specs["embedding"] == P(None, "fsdp")  # 29 tokens do not divide by 2
  block = specs["repeated"][0]
  assert block["mixer"]["alpha"]["kernel"] == P(None, "fsdp", "model")
  assert block["mlp"]["down"]["kernel"] == P(None, "model", "fsdp")
  assert block["mixer"]["forget_bias"] == P()

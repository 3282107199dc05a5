"""What the baselines publish: gates at the start, widths, and what each recurrence is by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from flax import nnx

from trellis_jax import LM, LMConfig, mixers, rotary, sharding

jax.config.update("jax_numpy_rank_promotion", "raise")

WIDTH, HEADS = 32, 4
X = jax.random.normal(jax.random.key(0), (2, 12, WIDTH))
BASELINES = [n for n in mixers.names() if hasattr(mixers.get(n).Config, "key_expand")]


def _layers(name, **knobs):
  """Yields the mixers of a built model's three layers."""
  cfg = LMConfig(11, WIDTH, 3, HEADS, mlp_width=16, mixer=name, mixers={name: knobs})
  graph, params = nnx.split(LM(cfg, rngs=nnx.Rngs(0)).repeated[0].mixer)
  for layer in range(3):
    yield nnx.merge(graph, jax.tree.map(lambda p: p[layer], params))


@pytest.mark.parametrize("name", BASELINES)
def test_every_parameter_learns(name):
  mixer = mixers.get(name).Mixer(WIDTH, HEADS, mixers.configure(name), rngs=nnx.Rngs(0))
  graph, params = nnx.split(mixer)
  loss = lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p)(X)[0]))
  for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
    assert np.all(np.isfinite(grad)) and np.any(np.asarray(grad) != 0), sharding.path_of(path)


def test_convolutions_of_keys_start_at_powers_of_their_decay_and_all_others_at_the_present():
  """Trellis's do so by default; the rivals' are published without, and take it as a knob."""
  present, past = [1, 0, 0, 0], [1, 0.5, 0.25, 0.125]
  convs = lambda mixer: {k: v for k, v in vars(mixer).items() if k.startswith("conv_") and v}
  for name in ("trellis", *BASELINES):
    if not hasattr(mixers.configure(name), "conv_taps"):
      continue
    for knobs in ({}, dict(conv_decay=0.0), dict(conv_decay=0.5)):
      config = mixers.configure(name, dict(conv_taps=4) | knobs)
      decay = knobs.get("conv_decay", 0.5 if name == "trellis" else 0)
      mixer = mixers.get(name).Mixer(WIDTH, HEADS, config, rngs=nnx.Rngs(0))
      for which, conv in convs(mixer).items():
        kernel = np.asarray(conv.kernel[...])
        keys = {"conv_k": kernel.shape[1], "conv_bc": kernel.shape[1] // 2}.get(which, 0)
        assert all(column == (past if decay else present) for column in kernel[:, :keys].T.tolist())
        assert all(column == present for column in kernel[:, keys:].T.tolist())


def test_a_spread_moves_every_tap_by_a_number_of_its_own_within_it():
  """Around the start that it has without; no two of a kernel, or of two seeds, are alike."""
  for name in ("trellis", *BASELINES):
    if not hasattr(mixers.configure(name), "conv_taps"):
      continue
    kernels = []
    for spread, seed in ((0.0, 0), (0.5, 0), (0.5, 1)):
      config = mixers.configure(name, dict(conv_taps=4, conv_spread=spread))
      mixer = mixers.get(name).Mixer(WIDTH, HEADS, config, rngs=nnx.Rngs(seed))
      convs = {k: v for k, v in vars(mixer).items() if k.startswith("conv_") and v}
      kernels.append({k: np.asarray(conv.kernel[...]) for k, conv in convs.items()})
    for which, start in kernels[0].items():
      noise = [kernel[which] - start for kernel in kernels[1:]]
      assert 0.4 < max(np.abs(n).max() for n in noise) <= 0.5, (name, which)
      assert len(np.unique(np.round(np.concatenate(noise), 6))) >= 0.99 * 2 * start.size


def test_mamba2_steps_and_rates_start_as_published():
  layers = list(_layers("mamba2", state_dim=8))
  for mixer in layers:
    dt, log_decay = mixer.steps(jnp.zeros_like(X))
    assert np.all((dt >= 1e-3 * 0.999) & (dt <= 0.1 * 1.001))
    rate = np.asarray(-log_decay / dt)
    assert np.all((rate >= 0.999) & (rate <= 16.01))
    live, _ = mixer.steps(X)
    assert np.all((live >= 1e-3 / 2.5) & (live <= 0.1 * 2.5))
  assert not np.allclose(layers[0].dt_bias[...], layers[1].dt_bias[...])
  assert np.all(np.asarray(layers[0].skip[...]) == 1)


def test_gated_delta_net_decays_start_as_published():
  for mixer in _layers("gated_delta_net"):
    log_decay, beta = mixer.decay_and_step(jnp.zeros_like(X))
    assert np.all((log_decay < 0) & (log_decay >= -1.6))
    assert op_cases.distance(beta, jnp.full_like(beta, 0.5)) <= 1e-6
    assert (mixer.head_dim, mixer.value_dim) == (6, 12)


def test_gates_of_gla_hgrn2_and_gsa_start_as_published():
  zero = jnp.zeros_like(X)
  for mixer in _layers("gla"):
    assert np.allclose(np.exp(mixer.log_decay(zero)), 0.5 ** (1 / 16), atol=1e-6)
    assert np.all(np.exp(mixer.log_decay(X)) > 0.7)
  for mixer in _layers("hgrn2", lower_bound=0.25):
    log_f, kept = mixer.forgets(3 * X)
    assert np.all(np.exp(log_f) > 0.25) and np.allclose(np.exp(log_f) + kept, 1, atol=1e-6)
  for mixer in _layers("gsa", num_slots=5):
    write, log_c = mixer.slots(zero)
    assert np.allclose(np.exp(log_c), 0.5 ** (1 / 8), atol=1e-6)
    assert np.allclose(np.exp(log_c) + write, 1, atol=1e-6)


def _by_hand(kind, mixer):
  """The published recurrence token by token, before norm and output map."""
  heads = lambda y: np.asarray(mixer.heads(y), np.float64)
  softmax = lambda y: np.exp(y) / np.exp(y).sum(-1, keepdims=True)
  if kind == "retnet":
    at = jnp.broadcast_to(jnp.arange(12)[None], (2, 12))
    q, k = (np.asarray(rotary.rotate(mixer.heads(w(X)), at)) for w in (mixer.q, mixer.k))
    v, c = heads(mixer.v(X)), (1 - 2.0 ** (-5 - np.arange(HEADS)))[None, :, None, None]
    s, out = 0, []
    for t in range(12):
      s = c * s + k[:, t, :, :, None] / np.sqrt(mixer.head_dim) * v[:, t, :, None, :]
      out.append(np.einsum("bhk,bhkv->bhv", q[:, t], s))
    return np.stack(out, 1)
  silu = lambda y: y / (1 + np.exp(-y))
  q, k, v = (heads(w(X)) for w in (mixer.q, mixer.k, mixer.v))
  if kind == "gsa":
    q, k, v = silu(q), silu(k), silu(v)
    c = (1 / (1 + np.exp(-heads(mixer.alpha(X))))) ** (1 / 8)
    a = 1 - c
  else:
    q, a = q / np.sqrt(mixer.head_dim), softmax(heads(mixer.alpha(X)))
    c = np.ones_like(a)
  s_k = s_v = 0
  out = []
  for t in range(12):
    s_k = c[:, t, :, :, None] * s_k + a[:, t, :, :, None] * k[:, t, :, None, :]
    s_v = c[:, t, :, :, None] * s_v + a[:, t, :, :, None] * v[:, t, :, None, :]
    r = softmax(np.einsum("bhmd,bhd->bhm", s_k, q[:, t]))
    out.append(np.einsum("bhmv,bhm->bhv", s_v, r))
  out = np.stack(out, 1)
  return silu(out) if kind == "gsa" else out


@pytest.mark.parametrize("name", ["retnet", "abc", "gsa"])
def test_recurrences_are_those_of_the_papers(name):
  config = mixers.configure(name, {} if name == "retnet" else dict(num_slots=5))
  mixer = mixers.get(name).Mixer(WIDTH, HEADS, config, rngs=nnx.Rngs(0))
  seen = {}
  output = mixer.output
  mixer.output = lambda o, x: seen.setdefault("o", o)
  jax.block_until_ready(mixer(X)[0])
  mixer.output = output
  assert op_cases.distance(seen["o"], _by_hand(name, mixer)) <= 1e-5


def test_linear_attention_normalises_as_published():
  config = mixers.configure("linear_attention", dict(normalize=True, post_norm="none"))
  mixer = mixers.get("linear_attention").Mixer(WIDTH, HEADS, config, rngs=nnx.Rngs(0))
  q, k = (jax.nn.elu(mixer.heads(w(X))) + 1 for w in (mixer.q, mixer.k))
  scores = jnp.einsum("bthd,bshd->bhts", q, k) * jnp.tril(jnp.ones((12, 12)))[None, None]
  o = jnp.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdims=True), mixer.heads(mixer.v(X)))
  assert op_cases.distance(mixer(X)[0], mixer.output(o, X)) <= 1e-5


@pytest.mark.parametrize(
  ("name", "knobs", "message"),
  [
    ("hgrn2", dict(lower_bound=1.0), r"lower_bound=1.0 .* \[0, 1\)"),
    ("mamba2", dict(head_dim=8), "head_dim=8 is not accepted; set state_dim or value_dim"),
    ("gla", dict(chunk_size=48), "chunk_size=48 is not accepted; it must be a power of two"),
    ("abc", dict(num_slots=0), "num_slots=0 is not accepted; it must be >= 1"),
    ("delta_net", dict(gate="relu"), "gate='relu' is unknown; accepted are gelu"),
  ],
)
def test_refusals_are_one_sentence(name, knobs, message):
  with pytest.raises(ValueError, match=message):
    mixers.configure(name, knobs)


def test_maps_of_gates_are_split_where_they_may_be():
  P = jax.sharding.PartitionSpec
  mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "model"))
  spec = lambda path, *shape: sharding.param_spec(path, shape, mesh)
  assert spec("mixer/low/kernel", 3, 16, 8) == P(None, "fsdp", None)
  assert spec("mixer/high/kernel", 3, 8, 16) == P(None, None, "model")
  assert spec("mixer/bc/kernel", 3, 16, 8) == P(None, "fsdp", None)
  assert spec("mixer/conv_bc/kernel", 3, 4, 8) == P(None, None, None)
  assert spec("mixer/conv_x/kernel", 3, 4, 8) == P(None, None, "model")

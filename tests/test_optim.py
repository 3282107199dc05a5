"""The schedules, the decay mask and the update itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import optim
from experiments.configs import default

jax.config.update("jax_numpy_rank_promotion", "raise")

PEAK, RATIO, WARMUP, DECAY, STEPS = 2e-3, 0.1, 10, 20, 100


def _config(**fields):
  cfg = default.get_config().optim
  cfg.update(peak_lr=PEAK, end_lr_ratio=RATIO, warmup_steps=WARMUP, decay_steps=DECAY)
  cfg.update(**fields)
  return cfg


def _rates(**fields):
  return np.array(jax.vmap(optim.schedule(_config(**fields), STEPS))(jnp.arange(STEPS)))


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
def test_every_schedule_warms_up_to_the_peak_and_ends_at_the_ratio(schedule):
  rates = _rates(schedule=schedule)
  start = (np.arange(WARMUP) + 1) / WARMUP
  np.testing.assert_allclose(rates[:WARMUP], PEAK * start, rtol=1e-6)
  np.testing.assert_allclose(rates[-1], PEAK * RATIO, rtol=1e-5)
  assert np.all(np.diff(rates[WARMUP:]) <= 0)
  assert np.all(rates > 0)


def test_shapes_of_the_decays():
  middle = WARMUP + (STEPS - WARMUP) // 2 - 1  # half of the decay is done with update n + 1
  half = PEAK * (1 + RATIO) / 2
  np.testing.assert_allclose(_rates(schedule="cosine")[middle], half, rtol=1e-5)
  np.testing.assert_allclose(_rates(schedule="linear")[middle], half, rtol=1e-5)
  quarter = WARMUP + (STEPS - WARMUP) // 4 - 1
  assert _rates(schedule="cosine")[quarter] > _rates(schedule="linear")[quarter] * 1.05
  wsd = _rates(schedule="wsd")
  np.testing.assert_allclose(wsd[WARMUP : STEPS - DECAY], PEAK, rtol=1e-6)
  np.testing.assert_allclose(wsd[STEPS - DECAY // 2 - 1], half, rtol=1e-5)


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
def test_no_warm_up_starts_at_the_peak_and_a_run_of_one_step_works(schedule):
  fields = {"schedule": schedule, "warmup_steps": 0, "decay_steps": 0}
  assert _rates(**fields)[0] > 0.99 * PEAK
  assert np.isfinite(optim.schedule(_config(**fields), 1)(0))


def _params():
  layer = {
    "proj": {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones((3, 5))},
    "gate": {"kernel": jnp.ones((3, 4, 2)), "bias": jnp.ones((3, 2))},
    "norm": {"scale": jnp.ones((3, 4))},
    "conv_q": {"kernel": jnp.ones((3, 4, 5))},
    "memory_k": jnp.ones((3, 2, 4, 4)),
  }
  return {
    "embedding": jnp.ones((7, 4)),
    "layers": layer,
    "head": jnp.ones((4, 7)),
  }


def test_decay_takes_the_matrices_alone_also_when_layers_are_stacked():
  mask = optim.decay_mask(_params())
  decayed = {jax.tree_util.keystr(p) for p, m in jax.tree_util.tree_leaves_with_path(mask) if m}
  assert decayed == {
    "['layers']['proj']['kernel']", "['layers']['gate']['kernel']", "['head']"
  }  # fmt: skip


def test_without_a_gradient_only_decay_moves_and_only_what_it_may():
  cfg = _config(weight_decay=0.5)
  tx, params = optim.optimizer(cfg, STEPS), _params()
  grads = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  rate = PEAK / WARMUP
  for update, decays in zip(jax.tree.leaves(updates), jax.tree.leaves(optim.decay_mask(params))):
    np.testing.assert_allclose(update, -rate * 0.5 * decays, rtol=1e-6)


def test_two_updates_are_those_of_adamw_by_hand():
  cfg = _config(clip=1.0, weight_decay=0.1)
  tx = optim.optimizer(cfg, STEPS)
  w, state = np.full((2, 2), 0.5), None
  params = {"kernel": jnp.array(w, jnp.float32)}
  state = tx.init(params)
  m = v = np.zeros((2, 2))
  for n, scale in enumerate((10.0, 0.1)):  # the first gradient is clipped, the second is not
    g = scale * np.array([[1.0, -2.0], [0.5, 3.0]])
    updates, state = tx.update({"kernel": jnp.array(g, jnp.float32)}, state, params)
    params = optax.apply_updates(params, updates)
    g = g / max(1.0, np.linalg.norm(g))
    m, v = cfg.b1 * m + (1 - cfg.b1) * g, cfg.b2 * v + (1 - cfg.b2) * g**2
    m_hat, v_hat = m / (1 - cfg.b1 ** (n + 1)), v / (1 - cfg.b2 ** (n + 1))
    rate = PEAK * (n + 1) / WARMUP
    w = w - rate * (m_hat / (np.sqrt(v_hat) + cfg.eps) + 0.1 * w)
    np.testing.assert_allclose(params["kernel"], w, rtol=2e-6)


def test_clip_0_does_not_clip():
  big = {"kernel": jnp.full((2, 2), 1e3)}
  # Adam's first update does not depend on the gradient's scale, but its moments do.
  tx = optim.optimizer(_config(clip=0.0), STEPS)
  _, state = tx.update(big, tx.init(big), big)
  moments = optax.tree_utils.tree_get(state, "mu")
  np.testing.assert_allclose(moments["kernel"], 1e3 * (1 - _config().b1), rtol=1e-5)


def test_moments_are_fp32():
  params = jax.tree.map(lambda x: x.astype(jnp.float32), _params())
  state = optim.optimizer(_config(), STEPS).init(params)
  moments = [optax.tree_utils.tree_get(state, name) for name in ("mu", "nu")]
  assert {x.dtype for x in jax.tree.leaves(moments)} == {jnp.dtype("float32")}

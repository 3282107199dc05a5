"""What a study notes of the memories, against the same numbers counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import config, traces
from experiments.tasks import mqar
from trellis_jax import LM, LMConfig, inspect

jax.config.update("jax_numpy_rank_promotion", "raise")


def _data(pairs, blanks):
  cfg = config.parse(["", "--config.data.task=mqar"]).data
  cfg.mqar.update(pairs=pairs, blanks=blanks)
  return cfg


def _batch(pairs=3, blanks=4, rows=5, seq_len=24):
  task = mqar.Config(20, pairs, blanks, False, 0.1, rows, rows, 0)
  found = mqar.Rows(task, "train", seq_len)
  return {k: np.stack([found[i][k] for i in range(rows)]) for k in found[0]}


def _lm(mixer="trellis", **knobs):
  cfg = LMConfig(
    vocab_size=20, width=16, num_layers=2, num_heads=2, mixer=mixer, mixers={mixer: knobs}
  )
  return LM(cfg, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("curvature", "together"), [(0.0, 4), (1.0, 1)])
def test_the_means_are_those_of_the_trace(curvature, together):
  lm, batch = _lm(num_slots=6, chunk_size=4, curvature=curvature), _batch()
  got = traces.measure(lm, batch, _data(3, 4))
  trace = inspect.trace_lm(lm, batch["tokens"], every=24)[1]
  assert all(value.shape == (2,) for value in got.values())
  before, after = (np.mean(trace[f"loss_{when}_v"]) for when in ("before", "after"))
  want = {
    "write_v": np.mean(trace["write_v"]),
    "gain_v": before - after,
    "overshoot": together * np.mean(trace["step_size"]),  # keys have length 1
    "rank_target": np.mean(
      [inspect.effective_rank(trace["target"][b, :, h]) for b in range(5) for h in range(2)]
    ),
  }
  for name, value in want.items():
    np.testing.assert_allclose(got[name][1], value, rtol=1e-4, err_msg=name)


def test_binding_counts_the_queries_that_meet_their_pair():
  batch = _batch()
  one_hot = np.eye(20)[batch["tokens"]][:, :, None]
  before = np.pad(one_hot, [(0, 0), (1, 0), (0, 0), (0, 0)])[:, :-1]
  trace = {"query": jnp.asarray(one_hot), "key": jnp.asarray(before)}
  assert traces.binding(trace, batch, 4, 3) == 1  # a value is written with the token before it
  first = before.copy()
  first[:, 5] = 1  # the first pair's value is near to everything
  share = traces.binding({**trace, "key": jnp.asarray(first)}, batch, 4, 3)
  np.testing.assert_allclose(share, 1 / 3, rtol=1e-6)


def test_the_higher_order_share_is_what_first_order_leaves_out():
  batch = _batch()

  def gradient(rho):
    graphdef, params = nnx.split(_lm(num_slots=6, chunk_size=4, outer_gradient=rho))

    def loss(params):
      hidden, _ = nnx.merge(graphdef, params).hidden(batch["tokens"])
      kernel = nnx.merge(graphdef, params).head_kernel()
      logits = jax.nn.log_softmax(hidden @ kernel)
      nll = -jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
      return jnp.sum(batch["weights"] * nll) / jnp.sum(batch["weights"])

    return np.concatenate([np.ravel(g) for g in jax.tree.leaves(jax.grad(loss)(params))])

  whole, first = gradient(1.0), gradient(0.0)
  want = np.linalg.norm(whole - first) / np.linalg.norm(whole)
  assert want > 0.01
  for rho in (1.0, 0.5):  # of the run itself: the same gradients are compared
    lm = _lm(num_slots=6, chunk_size=4, outer_gradient=rho)
    np.testing.assert_allclose(traces.higher_order(lm, batch), want, rtol=1e-4)


def test_layers_of_another_mixer_have_none():
  assert traces.measure(_lm("gla", head_dim=4), _batch(), _data(3, 4)) == {}

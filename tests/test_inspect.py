"""The trace of the memories against the model's own states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trellis_jax import LM, LMConfig, inspect
from trellis_jax.ops import activations

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def lm():
  knobs = dict(num_slots=6, chunk_size=4, step_init=0.3)
  cfg = LMConfig(vocab_size=19, width=16, num_layers=2, num_heads=2, mixers={"trellis": knobs})
  return LM(cfg, rngs=nnx.Rngs(0))


def test_the_trace_ends_in_the_state_of_the_model(lm):
  tokens = jax.random.randint(jax.random.key(0), (3, 24), 0, 19)
  traces = inspect.trace_lm(lm, tokens, every=8)
  _, ((state,), _) = lm(tokens)
  assert len(traces) == 2
  for layer, trace in enumerate(traces):
    assert trace["loss_before_k"].shape == trace["forget_gate"].shape == (3, 24, 2)
    assert trace["memory_k"].shape == (3, 3, 2, 6, 8)
    np.testing.assert_allclose(
      trace["memory_v"][:, -1], state.memory.memory_v[layer], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
      trace["norm_k"], np.linalg.norm(np.asarray(trace["memory_k"]), axis=(-2, -1)), rtol=1e-5
    )


def test_a_first_write_lowers_its_own_loss(lm):
  tokens = jnp.full((2, 8), 3)
  trace = inspect.trace_lm(lm, tokens, every=8)[0]
  for name in "kv":
    before, after = trace[f"loss_before_{name}"][:, 0], trace[f"loss_after_{name}"][:, 0]
    assert np.all(np.asarray(after) < np.asarray(before))


def test_writes_are_what_a_token_adds(lm):
  """The first token of a document, also of a second one, writes g u w^T onto zeros."""
  tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 19)
  ids = jnp.asarray([[1] * 8, [1] * 5 + [2] * 3], jnp.int32)
  trace = inspect.trace_lm(lm, tokens, segment_ids=ids, every=1)[1]
  for name, w in (("k", trace["key"]), ("v", trace["value"])):
    u = activations.inner_gradient("ln_silu", 0 * trace["target"], trace["target"], 1.0)
    expected = trace["step_size"] * jnp.linalg.norm(u, axis=-1) * jnp.linalg.norm(w, axis=-1)
    for row, t in ((0, 0), (1, 5)):
      np.testing.assert_allclose(trace[f"write_{name}"][row, t], expected[row, t], rtol=1e-5)
      np.testing.assert_allclose(trace[f"norm_{name}"][row, t], expected[row, t], rtol=1e-5)
      loss = 0.5 * np.sum(np.square(trace["target"][row, t]), axis=-1)
      np.testing.assert_allclose(trace[f"loss_before_{name}"][row, t], loss, rtol=1e-5)
    assert trace[f"norm_{name}"].shape == (2, 8, 2)


def test_effective_rank_of_known_matrices():
  eye, one = jnp.eye(4), jnp.ones((4, 4))
  np.testing.assert_allclose(inspect.effective_rank(jnp.stack([eye, one])), [4, 1], rtol=1e-4)
  assert inspect.effective_rank(jnp.zeros((3, 5))) == 1


def test_snapshots_must_divide_the_tokens(lm):
  with pytest.raises(ValueError, match="every=7 is not accepted; it must divide the 24 tokens"):
    inspect.trace_lm(lm, jnp.zeros((1, 24), jnp.int32), every=7)

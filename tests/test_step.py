"""One update and one evaluation: accumulation, masks, dtypes, the numbers that are reported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import optim, step
from experiments.configs import default

jax.config.update("jax_numpy_rank_promotion", "raise")

VOCAB, WIDTH = 11, 8


class Bigram(nnx.Module):
  """The smallest module with what the trainer asks of a language model."""

  def __init__(self, dtype=jnp.float32, *, rngs):
    self.embed = nnx.Embed(VOCAB, WIDTH, dtype=dtype, rngs=rngs)
    self.mlp = nnx.Linear(WIDTH, WIDTH, dtype=dtype, rngs=rngs)

  def hidden(self, tokens, *, segment_ids):
    live = (segment_ids > 0)[..., None]
    return jnp.where(live, jnp.tanh(self.mlp(self.embed(tokens))), 0), None

  def head_kernel(self):
    return self.embed.embedding[...].T


def _batch(rows=8, seq_len=6):
  rng = np.random.default_rng(0)
  lengths = np.arange(rows) * seq_len // rows  # rows count from 0 to almost all of their tokens
  live = np.arange(seq_len)[None] < lengths[:, None]
  return {
    "tokens": jnp.array(rng.integers(0, VOCAB, (rows, seq_len)), jnp.int32),
    "targets": jnp.array(rng.integers(0, VOCAB, (rows, seq_len)), jnp.int32),
    "segment_ids": jnp.array(live, jnp.int32),
    "weights": jnp.array(live, jnp.float32),
  }


def _setup(dtype=jnp.float32, z_loss=1e-3, **fields):
  cfg = default.get_config().optim
  cfg.update(**fields)
  make = lambda: Bigram(dtype, rngs=nnx.Rngs(0))
  graphdef, _ = nnx.split(nnx.eval_shape(make), nnx.Param)
  sums_fn = step.loss_fn(graphdef, z_loss=z_loss, batch_shards=1)
  optimizer, schedule = optim.optimizer(cfg, 1000), optim.schedule(cfg, 1000)
  update = functools.partial(
    step.train_step, sums_fn=sums_fn, optimizer=optimizer, schedule=schedule
  )
  return sums_fn, update, step.init_state(make, optimizer)


@pytest.mark.parametrize("grad_accum", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_large_batch(grad_accum):
  sums_fn, _, state = _setup()
  run = jax.jit(lambda k: step.gradients(sums_fn, state.params, _batch(), k), static_argnums=0)
  (grads, sums), (want_grads, want_sums) = run(grad_accum), run(1)
  for got, want in zip(sums, want_sums):
    np.testing.assert_allclose(got, want, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-8), grads, want_grads
  )


def test_a_mean_of_microbatch_means_would_be_something_else():
  sums_fn, _, state = _setup()
  half = lambda i: jax.tree.map(lambda x: x[i::2], _batch())
  run = jax.jit(lambda batch: step.gradients(sums_fn, state.params, batch, 1)[0])
  of = lambda batch: run(batch)["mlp"]["kernel"]
  mean = (of(half(0)) + of(half(1))) / 2
  assert np.max(np.abs(mean - of(_batch()))) > 1e-3 * np.max(np.abs(mean))


def test_microbatches_are_strided_so_that_devices_keep_their_rows():
  seen = step.sum_over_microbatches(
    lambda x: x[None] * 10.0 ** jnp.arange(2)[None, :, None], jnp.arange(4.0)[:, None], 2
  )
  np.testing.assert_array_equal(seen[0, :, 0], [0 + 1, 20 + 30])


def test_metrics_are_those_of_the_update():
  sums_fn, update, state = _setup(clip=0.01)
  new, metrics = jax.jit(update)(state, batch := _batch())
  sums = sums_fn(state.params, batch)
  count = float(np.sum(batch["weights"]))
  np.testing.assert_allclose(metrics["loss"], sums.nll / count, rtol=1e-6)
  np.testing.assert_allclose(metrics["accuracy"], sums.correct / count, rtol=1e-6)
  assert metrics["tokens"] == count
  norm = lambda tree: np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
  moved = jax.tree.map(jnp.subtract, new.params, state.params)
  np.testing.assert_allclose(metrics["update_norm"], norm(moved), rtol=1e-4)
  np.testing.assert_allclose(metrics["param_norm"], norm(new.params), rtol=1e-6)
  warming = default.get_config().optim
  np.testing.assert_allclose(
    metrics["learning_rate"], warming.peak_lr / warming.warmup_steps, rtol=1e-6
  )
  grads = jax.grad(lambda p: sums_fn(p, batch).objective / count)(state.params)
  np.testing.assert_allclose(metrics["grad_norm"], norm(grads), rtol=1e-5)  # before the clip
  assert metrics["grad_norm"] > 0.01
  assert new.step == 1


def test_training_lowers_the_loss():
  _, update, state = _setup(peak_lr=1e-2, warmup_steps=0)
  update, losses = jax.jit(update), []
  for _ in range(60):
    state, metrics = update(state, _batch())
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.5 * losses[0]


def test_bf16_compute_keeps_parameters_gradients_and_moments_in_fp32():
  sums_fn, update, state = _setup(jnp.bfloat16)
  run = lambda fn, k: jax.jit(lambda p: step.gradients(fn, p, _batch(), k)[0])(state.params)
  grads = run(sums_fn, 2)
  new, metrics = jax.jit(update)(state, _batch())
  arrays = (grads, new.params, optax.tree_utils.tree_get(new.opt_state, "mu"), metrics["loss"])
  assert {x.dtype for x in jax.tree.leaves(arrays)} == {jnp.dtype("float32")}
  exact = run(_setup()[0], 1)
  difference = jax.tree.map(jnp.subtract, grads, exact)
  assert 0 < optax.tree.norm(difference) < 0.03 * optax.tree.norm(exact)


def test_a_batch_without_a_counted_token_is_finite_and_moves_nothing_but_decay():
  _, update, state = _setup(weight_decay=0.0)
  batch = _batch() | {"weights": jnp.zeros((8, 6))}
  new, metrics = jax.jit(update)(state, batch)
  assert all(np.isfinite(x) for x in metrics.values())
  assert metrics["loss"] == 0
  jax.tree.map(np.testing.assert_array_equal, new.params, state.params)


@pytest.mark.parametrize("grad_accum", [1, 4])
def test_evaluation_sums_tokens_and_bytes_of_what_counts(grad_accum):
  sums_fn, _, state = _setup()
  batch, token_bytes = _batch(), jnp.arange(VOCAB) % 4
  got = step.eval_step(state.params, batch, token_bytes, sums_fn=sums_fn, grad_accum=grad_accum)
  want = sums_fn(state.params, batch)
  np.testing.assert_allclose(got["nll"], want.nll, rtol=1e-6)
  assert got["count"] == want.count
  assert got["correct"] == want.correct
  size = np.array(token_bytes)[np.array(batch["targets"])] * np.array(batch["weights"])
  assert got["bytes"] == size.sum()

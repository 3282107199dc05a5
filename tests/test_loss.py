"""The chunked cross-entropy against the plain formula: values, gradients, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import loss

jax.config.update("jax_numpy_rank_promotion", "raise")


def _inputs(batch=3, seq_len=13, width=8, vocab=23, dtype=jnp.float32, scale=1.0):
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = scale * jax.random.normal(keys[0], (batch, seq_len, width), dtype)
  kernel = jax.random.normal(keys[1], (width, vocab))
  targets = jax.random.randint(keys[2], (batch, seq_len), 0, vocab)
  weights = jax.random.bernoulli(keys[3], 0.7, (batch, seq_len)).astype(jnp.float32)
  return hidden, kernel, targets, weights


def _plain(hidden, kernel, targets, weights, z_loss=0.0):
  """The definition, with all logits at once."""
  logits = (hidden @ kernel.astype(hidden.dtype)).astype(jnp.float32)
  lse = jax.nn.logsumexp(logits, axis=-1)
  nll = lse - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  correct = jnp.argmax(logits, axis=-1) == targets
  total = lambda x: jnp.sum(weights * x)
  return loss.LossSums(total(nll + z_loss * lse**2), total(nll), total(correct), jnp.sum(weights))


@pytest.mark.parametrize("chunk, z_loss", [(1, 1e-2), (4, 1e-2), (13, 1e-2), (None, 0.0)])
def test_sums_and_gradients_are_those_of_the_plain_formula(chunk, z_loss):
  hidden, kernel, targets, weights = _inputs()

  def run(fn, **kwargs):
    def mean(hidden, kernel):
      sums = fn(hidden, kernel, targets, weights, z_loss=z_loss, **kwargs)
      return sums.objective / sums.count, sums

    grads, sums = jax.jit(jax.grad(mean, argnums=(0, 1), has_aux=True))(hidden, kernel)
    return sums, grads

  (sums, grads), (want_sums, want_grads) = run(loss.cross_entropy, chunk=chunk), run(_plain)
  for name, got, want in zip(sums._fields, sums, want_sums):
    np.testing.assert_allclose(got, want, rtol=2e-6, err_msg=name)
  for got, want in zip(grads, want_grads):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunk", [4, None])
def test_without_a_gradient_the_sums_are_the_same(chunk):
  got = loss.cross_entropy(*(inputs := _inputs()), z_loss=1e-2, chunk=chunk)
  for name, a, b in zip(got._fields, got, _plain(*inputs, z_loss=1e-2)):
    np.testing.assert_allclose(a, b, rtol=2e-6, err_msg=name)


def test_tied_head_adds_the_gradients_of_its_two_uses():
  _, kernel, targets, weights = _inputs(vocab=23)
  embedding = kernel.T  # [vocab, width]

  def tied(fn):
    def objective(embedding):
      return fn(jnp.tanh(embedding[targets]), embedding.T, targets, weights).objective

    return jax.grad(objective)(embedding)

  np.testing.assert_allclose(tied(loss.cross_entropy), tied(_plain), rtol=1e-5, atol=1e-6)


def test_bf16_hidden_states_keep_fp32_sums():
  hidden, kernel, targets, weights = _inputs(dtype=jnp.bfloat16, width=64, vocab=301)
  exact = _plain(hidden.astype(jnp.float32), kernel.astype(jnp.bfloat16), targets, weights)
  got = loss.cross_entropy(hidden, kernel, targets, weights)
  assert got.nll.dtype == jnp.float32
  # The inputs are bf16 in both; only an fp32 accumulation and logsumexp come this close.
  np.testing.assert_allclose(got.nll, exact.nll, rtol=1e-5)
  grads = jax.grad(lambda *a: loss.cross_entropy(*a, targets, weights).objective, (0, 1))
  d_hidden, d_kernel = grads(hidden, kernel)
  assert (d_hidden.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.float32)


def test_large_logits_do_not_overflow():
  inputs = _inputs(scale=1e4)
  got = loss.cross_entropy(*inputs)
  np.testing.assert_allclose(got.nll, _plain(*inputs).nll, rtol=1e-5)
  assert np.isfinite(
    jax.grad(lambda h: loss.cross_entropy(h, *inputs[1:]).objective)(inputs[0])
  ).all()


def test_weightless_positions_carry_neither_loss_nor_gradient():
  hidden, kernel, targets, weights = _inputs()
  weights = weights.at[:, 5:].set(0.0)
  fn = lambda h: loss.cross_entropy(h, kernel, targets, weights, chunk=4)
  moved = hidden.at[:, 5:].add(3.0)
  assert fn(hidden) == fn(moved)
  assert not np.any(jax.grad(lambda h: fn(h).objective)(hidden)[:, 5:])


def test_only_the_objective_has_a_gradient():
  inputs = _inputs()
  for field in ("nll", "correct"):
    slope = jax.grad(lambda h, field=field: getattr(loss.cross_entropy(h, *inputs[1:]), field))
    assert not np.any(slope(inputs[0]))


@pytest.mark.parametrize("rows, seq_len", [(1, 1), (8, 1024), (3, 1000), (4096, 7), (1, 100_000)])
def test_chunks_cover_the_sequence_with_little_padding(rows, seq_len):
  chunk = loss.chunk_length(rows, seq_len)
  chunks = -(-seq_len // chunk)
  assert 1 <= chunk <= seq_len
  assert chunk == 1 or rows * chunk <= loss.CHUNK_TOKENS
  assert chunks * chunk - seq_len < chunks


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_temporary_memory_never_holds_a_batch_of_logits(dtype):
  shapes = _inputs(batch=4, seq_len=2048, width=32, vocab=4096, dtype=dtype)
  grad = jax.jit(jax.grad(lambda *a: loss.cross_entropy(*a).objective, argnums=(0, 1)))
  temporary = grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
  tokens, vocab = 4 * 2048, 4096
  # Three chunks' logits in fp32; a batch's in bf16 would be 67 MB.
  assert temporary < 3 * loss.CHUNK_TOKENS * vocab * 4 + tokens * 32 * 16
  assert temporary < tokens * vocab * 2

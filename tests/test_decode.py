"""Reading, scoring and decoding in pieces equal one pass over the whole text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.evals import decode
from trellis_jax import LM, LMConfig, generate, mixers

jax.config.update("jax_numpy_rank_promotion", "raise")

VOCAB = 23
# Layers that repeat and one that does not; states with and without a leading axis of their own.
PATTERN = ("trellis", "attention")


@pytest.fixture(scope="module")
def lm():
  knobs = {
    "trellis": dict(num_slots=8, chunk_size=4, initial_memory="learned"),
    "attention": dict(cache_length=64),
  }
  sizes = dict(width=16, num_layers=3, num_heads=2, mlp_width=16)
  cfg = LMConfig(VOCAB, **sizes, mixer=PATTERN, mixers=knobs, init_std=0.5)
  return LM(cfg, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def texts():
  rng = np.random.default_rng(0)
  return [rng.integers(0, VOCAB, n).tolist() for n in (5, 40, 1, 17, 33)]


@pytest.fixture(scope="module")
def follow():
  rng = np.random.default_rng(1)
  return [rng.integers(0, VOCAB, n).tolist() for n in (3, 9, 1, 20, 0)]


@pytest.fixture(scope="module")
def whole(lm):
  """The log-probabilities of one text by one pass, padded to a length compiled once."""
  run = nnx.jit(lambda lm, tokens: jax.nn.log_softmax(lm(tokens)[0]))

  def log_p(text):
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(text)] = text
    return np.asarray(run(lm, jnp.asarray(padded))[0], np.float64)

  return log_p


def test_scores_are_those_of_one_pass(lm, texts, follow, whole):
  decoder = decode.Decoder(lm, piece=8)
  nats, likeliest, _ = decoder.score(decoder.read(texts), follow)
  for text, more, got, best in zip(texts, follow, nats, likeliest):
    log_p = whole(text + more)
    at = np.arange(len(text) - 1, len(text) + len(more) - 1)
    np.testing.assert_allclose(-log_p[at, more].sum() if more else 0.0, got, rtol=1e-5, atol=1e-5)
    assert best == (log_p[at].argmax(-1) == more).all()


def test_the_likeliest_continuation_is_known_as_such(lm, texts):
  decoder = decode.Decoder(lm, piece=8)
  reading = decoder.read(texts)
  greedy = decoder.greedy(reading, 6)
  assert decoder.score(reading, greedy)[1] == [True] * 5
  greedy[3][-1] = (greedy[3][-1] + 1) % VOCAB
  assert decoder.score(reading, greedy)[1] == [True, True, True, False, True]


def test_a_reading_serves_any_rows_and_any_number_of_times(lm, texts, follow, whole):
  decoder = decode.Decoder(lm, piece=8)
  reading = decoder.read(texts)
  rows = [3, 3, 0, 4, 1, 3, 2]
  more = [follow[i] for i in (0, 1, 1, 2, 3, 3, 0)]
  nats, _, after = decoder.score(decoder.take(reading, rows), more)
  assert after.count == 7
  for row, text, got in zip(rows, more, nats):
    before = texts[row]
    log_p = whole(before + text)[np.arange(len(before) - 1, len(before) + len(text) - 1), text]
    np.testing.assert_allclose(-log_p.sum(), got, rtol=1e-5)
  again, _, _ = decoder.score(decoder.take(reading, rows), more)
  np.testing.assert_array_equal(again, nats)


def test_greedy_is_what_generate_gives(lm, texts):
  decoder = decode.Decoder(lm, piece=8)
  expected = generate(lm, texts, max_new_tokens=19, temperature=0)
  assert decoder.greedy(decoder.read(texts), 19) == expected


def test_greedy_ends_when_all_rows_are_done(lm, texts):
  decoder = decode.Decoder(lm, piece=8)
  reading, asked = decoder.read(texts), []
  new = decoder.greedy(reading, 64, lambda i, row: bool(asked.append(i)) or len(row) >= 32)
  assert [len(row) for row in new] == [2 * decode.STEPS] * 5
  assert decoder.greedy(reading, 64)[2][:32] == new[2]


def test_sizes_are_powers_of_two():
  assert [decode._up(n, 8) for n in (1, 8, 9, 64, 65)] == [8, 8, 16, 64, 128]


@pytest.mark.parametrize("mixer", mixers.names())
def test_rows_are_where_every_mixer_has_them(mixer):
  """A reading's rows are taken along the first axis, behind the one of layers that repeat."""
  cfg = LMConfig(VOCAB, width=16, num_layers=3, num_heads=2, mlp_width=16, mixer=(mixer, mixer))
  state = nnx.eval_shape(lambda: LM(cfg, rngs=nnx.Rngs(0)).init_state(5))
  repeated, rest = state
  assert {x.shape[1] for x in jax.tree.leaves(repeated)} == {5}
  assert {x.shape[0] for x in jax.tree.leaves(rest)} == {5}

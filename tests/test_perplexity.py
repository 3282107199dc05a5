"""The perplexity evaluator: against a uniform model, a direct computation and brute force."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import data, loss
from experiments.evals import perplexity
from experiments.tokenfile import TokenFile, TokenWriter
from trellis_jax import LM, LMConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

VOCAB, SEPARATOR, SEQ_LEN, ROWS = 23, 22, 40, 4
TOKEN_BYTES = np.append(np.arange(1, VOCAB), 0)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
  """A token file of documents of many lengths, some longer than a row."""
  path = tmp_path_factory.mktemp("split") / "test.tok"
  names = {"tokenizer": "none", "tokenizer_digest": "", "corpus": "random"}
  rng = np.random.default_rng(0)
  with TokenWriter(path, vocab_size=VOCAB, separator=SEPARATOR, **names) as writer:
    for length in (3, 90, 1, 17, 40, 39, 61, 5, 5, 128, 2):
      tokens = rng.integers(0, SEPARATOR, length)
      writer.append(tokens, int(TOKEN_BYTES[tokens].sum()))
  return TokenFile(path)


@pytest.fixture(scope="module")
def lm():
  knobs = dict(num_slots=6, chunk_size=4)
  sizes = dict(width=16, num_layers=2, num_heads=2, mlp_width=16)
  cfg = LMConfig(VOCAB, **sizes, mixers={"trellis": knobs}, tie_embeddings=False)
  return LM(cfg, rngs=nnx.Rngs(0))


def batches_of(split, **kwargs):
  settings = dict(seq_len=SEQ_LEN, batch_size=ROWS) | kwargs
  return lambda: data.loader(split, shuffle=False, repeat=False, **settings)


def evaluator_of(predict, batches):
  return perplexity.Evaluator(predict, batches=batches, seq_len=SEQ_LEN, token_bytes=TOKEN_BYTES)


def direct(lm, batches):
  """(nats, position) of every target, from whole logits, in a Python loop over the tokens."""
  found = []
  for batch in batches():
    logits, _ = lm(jnp.asarray(batch["tokens"]), segment_ids=jnp.asarray(batch["segment_ids"]))
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    for row, t in zip(*np.nonzero(batch["weights"])):
      segment = batch["segment_ids"][row]
      position = int((segment[:t] == segment[t]).sum())
      found.append((-log_p[row, t, batch["targets"][row, t]], position))
  return found


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(split, lm):
  graphdef, params = nnx.split(lm, nnx.Param)
  params = nnx.to_pure_dict(params)
  params["head"] = jnp.zeros_like(params["head"])
  evaluator = evaluator_of(perplexity.predict(graphdef), batches_of(split))
  values = dict(evaluator.run(params))
  assert values["nll"] == pytest.approx(math.log(VOCAB), rel=1e-6)
  assert values["perplexity"] == pytest.approx(VOCAB, rel=1e-5)
  bits = (split.num_tokens - 1) * math.log2(VOCAB) / split.num_bytes
  assert values["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
  for first, last in [(0, 15), (16, 31), (32, 39)]:
    assert values[f"perplexity/{first}-{last}"] == pytest.approx(VOCAB, rel=1e-5)


@pytest.mark.parametrize(("packing", "batch_size"), [("documents", 4), ("concat", 1)])
def test_totals_are_those_of_whole_logits(split, lm, packing, batch_size):
  graphdef, params = nnx.split(lm, nnx.Param)
  batches = batches_of(split, packing=packing, batch_size=batch_size)
  totals = evaluator_of(perplexity.predict(graphdef), batches).totals(params)
  expected = direct(lm, batches)
  total = perplexity.add(totals)
  assert total.tokens == len(expected)
  assert total.nats == pytest.approx(sum(nats for nats, _ in expected), rel=1e-5)
  for (first, last), part in zip(perplexity.ranges(SEQ_LEN), totals):
    inside = [nats for nats, position in expected if first <= position <= last]
    assert part.tokens == len(inside) > 0
    assert part.nats == pytest.approx(sum(inside), rel=1e-5)
    assert part.perplexity == pytest.approx(math.exp(np.mean(inside)), rel=1e-4)


@pytest.mark.parametrize(
  "settings", [{}, {"packing": "concat"}, {"align": 8}, {"batch_size": 1}, {"batch_size": 64}]
)
def test_no_token_is_dropped_and_none_counted_twice(split, settings):
  """Every target weighs one nat here, and padding would weigh NaN."""
  predict = lambda one, batch: jnp.where(batch["weights"] > 0, one, jnp.nan)
  evaluator = evaluator_of(predict, batches_of(split, **settings))
  for _ in range(2):  # a second run sees the same
    total = perplexity.add(evaluator.totals(jnp.float32(1)))
    assert (total.nats, total.tokens) == (split.num_tokens - 1, split.num_tokens - 1)
    assert total.bytes == split.num_bytes


def test_run_yields_what_the_totals_say(split):
  evaluator = evaluator_of(lambda x, batch: x * batch["targets"], batches_of(split))
  values = dict(evaluator.run(jnp.float32(0.1)))
  totals = evaluator.totals(jnp.float32(0.1))
  nats = 0.1 * float(split.tokens[1:].astype(np.int64).sum())
  assert values["nll"] * values["tokens"] == pytest.approx(nats, rel=1e-5)
  assert values["bytes"] == split.num_bytes
  assert [values[f"tokens/{a}-{b}"] for a, b in perplexity.ranges(SEQ_LEN)] == [
    part.tokens for part in totals
  ]


def test_positions_count_what_was_seen_of_a_segment_in_its_row():
  ids = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
  np.testing.assert_array_equal(
    perplexity.positions(ids), [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
  )


@pytest.mark.parametrize(
  ("seq_len", "expected"),
  [
    (1, [(0, 0)]),
    (16, [(0, 15)]),
    (17, [(0, 15), (16, 16)]),
    (100, [(0, 15), (16, 31), (32, 63), (64, 99)]),
    (128, [(0, 15), (16, 31), (32, 63), (64, 127)]),
  ],
)
def test_buckets_are_powers_of_two_and_hold_every_position_once(seq_len, expected):
  assert perplexity.ranges(seq_len) == expected
  found = perplexity.buckets(np.ones((1, seq_len), np.int32))[0]
  sizes = [last - first + 1 for first, last in expected]
  np.testing.assert_array_equal(found, np.repeat(np.arange(len(expected)), sizes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nll_in_chunks_is_that_of_whole_logits(monkeypatch, dtype):
  monkeypatch.setattr(loss, "CHUNK_TOKENS", 8)  # 2 rows: chunks of 4, the last one padded
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (2, 11, 5), dtype)
  kernel = 100 * jax.random.normal(keys[1], (5, VOCAB), dtype)  # logits that overflow exp
  targets = jax.random.randint(keys[2], (2, 11), 0, VOCAB)
  logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
  expected = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
  expected -= np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
  assert logits.max() > 200
  np.testing.assert_allclose(
    perplexity.token_nll(hidden, kernel, targets), expected, rtol=1e-5, atol=1e-3
  )

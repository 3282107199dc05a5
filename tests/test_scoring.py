"""Scores of many continuations: what whole passes give, and each context read once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.evals import decode, scoring
from trellis_jax import LM, LMConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

VOCAB, BOS, LONGEST = 29, 28, 96


@pytest.fixture(scope="module")
def lm():
  cfg = LMConfig(
    VOCAB,
    width=16,
    num_layers=1,
    num_heads=2,
    mlp_width=16,
    mixers={"trellis": dict(num_slots=8, chunk_size=4)},
    init_std=0.5,
  )
  return LM(cfg, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def scorer(lm):
  return scoring.Scorer(lm, BOS, rows=4, piece=8)


@pytest.fixture(scope="module")
def plain(lm):
  """(log-probability of `more` after `text`, whether it is greedy) by one pass over both."""
  run = nnx.jit(lambda lm, tokens: jax.nn.log_softmax(lm(tokens)[0]))

  def score(text, more):
    whole = [BOS, *text, *more]
    tokens = np.zeros((1, LONGEST), np.int32)
    tokens[0, : len(whole)] = whole
    log_p = np.asarray(run(lm, jnp.asarray(tokens))[0], np.float64)
    at = np.arange(len(text), len(text) + len(more))
    return log_p[at, more].sum(), bool((log_p[at].argmax(-1) == more).all())

  return score


@pytest.fixture(scope="module")
def pairs():
  """Contexts of many lengths, one of them empty and some of them shared."""
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(0, BOS, n).tolist()
  contexts = [draw(n) for n in (1, 30, 7, 0, 18, 50, 16)]
  return [(contexts[i], draw(n)) for i, n in zip([0, 1, 2, 1, 3, 4, 1, 5, 1, 6, 5], range(1, 12))]


def test_log_likelihoods_are_those_of_whole_passes(scorer, plain, pairs):
  greedy = [(pairs[0][0], scorer.decoder.greedy(scorer.decoder.read([[BOS, *pairs[0][0]]]), 5)[0])]
  found = scorer.loglikelihoods(pairs + greedy)
  for (context, more), (value, best) in zip(pairs + greedy, found):
    expected, likeliest = plain(context, more)
    assert value == pytest.approx(expected, abs=1e-4) and best == likeliest
  assert found[-1][1] and not all(best for _, best in found)


def test_they_do_not_depend_on_order_or_company(scorer, pairs):
  found = scorer.loglikelihoods(pairs)
  turned = scorer.loglikelihoods(pairs[::-1])[::-1]
  np.testing.assert_allclose([a for a, _ in found], [b for b, _ in turned], atol=1e-4)
  assert scorer.loglikelihoods([]) == []


def test_what_stands_before_a_text_is_not_added_twice(scorer, pairs):
  context, more = pairs[1]
  assert scorer.loglikelihoods([([BOS, *context], more)]) == scorer.loglikelihoods([pairs[1]])
  assert scorer.loglikelihoods([([BOS], more)]) == scorer.loglikelihoods([([], more)])


def test_each_context_is_read_once(lm, pairs, monkeypatch):
  read, advance = [], decode._advance

  def count(graph, scored, params, state, hidden, tokens, live):
    read.append((scored, int(live.sum())))
    return advance(graph, scored, params, state, hidden, tokens, live)

  monkeypatch.setattr(decode, "_advance", count)
  seen = []
  track = lambda batches: seen.append(len(batches)) or batches
  scoring.Scorer(lm, BOS, rows=4, piece=8, track=track).loglikelihoods(pairs)
  distinct = {tuple(context) for context, _ in pairs}
  assert sum(n for scored, n in read if not scored) == sum(len(c) + 1 for c in distinct)
  assert sum(n for scored, n in read if scored) == sum(len(more) for _, more in pairs)
  assert seen == [2]  # seven contexts


def test_texts_are_scored_whole_however_long(scorer, plain):
  rng = np.random.default_rng(1)
  texts = [rng.integers(0, BOS, n).tolist() for n in (5, 95, 0, 33, 16, 1)]
  found = scorer.texts(texts)
  for text, value in zip(texts, found):
    assert value == pytest.approx(plain([], text)[0], abs=1e-4)


def test_greedy_continues_each_context_in_its_place(scorer, pairs):
  contexts = [context for context, _ in pairs[:6]]
  found = scorer.greedy(contexts, 9, lambda row, tokens: False)
  for context, new in zip(contexts, found):
    reading = scorer.decoder.read([[BOS, *context]])
    assert new == scorer.decoder.greedy(reading, 9)[0] and len(new) == 9
  asked = set()
  scorer.greedy(contexts, 9, lambda row, tokens: bool(asked.add((row, len(tokens)))))
  assert {row for row, _ in asked} <= set(range(6)) and len({row for row, _ in asked}) >= 2

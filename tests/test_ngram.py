"""Baselines against brute force, a known source and the definition of their units."""

import collections
import lzma
import random

import numpy as np
import pytest

from experiments import tokenise
from experiments.data import Dataset
from experiments.evals import ngram
from experiments.tokenfile import TokenFile, TokenWriter


def brute_force(train, held_out, order, vocab_size):
  """Witten-Bell by its definition, one symbol and one recursion at a time."""
  followers = collections.defaultdict(collections.Counter)
  for n in range(order):
    for i in range(n, len(train)):
      followers[tuple(train[i - n : i])][train[i]] += 1

  def p(symbol, history):
    lower = p(symbol, history[1:]) if history else 1 / vocab_size
    seen = followers.get(history)
    if not seen:
      return lower
    return (seen[symbol] + len(seen) * lower) / (sum(seen.values()) + len(seen))

  return [
    -np.log2(p(w, tuple(held_out[max(0, i - order + 1) : i]))) for i, w in enumerate(held_out)
  ]


@pytest.mark.parametrize("vocab_size", [3, 40])
@pytest.mark.parametrize("lengths", [(300, 80), (5, 60), (1, 3), (300, 1), (300, 0)])
def test_witten_bell_is_its_definition(vocab_size, lengths):
  rng = np.random.default_rng(0)
  train, held_out = (rng.integers(0, vocab_size, n) for n in lengths)
  bits = ngram.witten_bell(train, held_out, 4, vocab_size)
  for order in range(1, 5):
    expected = brute_force(train.tolist(), held_out.tolist(), order, vocab_size)
    np.testing.assert_allclose(bits[order - 1], expected, rtol=1e-12)


def test_probabilities_sum_to_one():
  rng = np.random.default_rng(1)
  train, context = rng.integers(0, 7, 200), rng.integers(0, 7, 5)
  last = [ngram.witten_bell(train, np.append(context, w), 4, 8)[:, -1] for w in range(8)]
  np.testing.assert_allclose(np.exp2(-np.array(last)).sum(0), 1, rtol=1e-12)


def test_a_markov_source_costs_its_entropy_from_the_bigram_on():
  rng = np.random.default_rng(2)
  symbols = [0]
  for stays in rng.random(200_000) < 0.9:
    symbols.append(symbols[-1] if stays else 1 - symbols[-1])
  bits = ngram.witten_bell(np.array(symbols[:150_000]), np.array(symbols[150_000:]), 4, 2).mean(1)
  entropy = -0.9 * np.log2(0.9) - 0.1 * np.log2(0.1)
  assert bits[0] == pytest.approx(1, abs=0.01)
  np.testing.assert_allclose(bits[1:], entropy, rtol=0.02)


def test_token_perplexities_leave_out_the_first_separator():
  train, held_out = np.array([0, 1, 2, 1, 2, 0]), np.array([0, 2, 1, 0])
  unigram, bigram = ngram.token_perplexities(train, held_out, 3)
  bits = [np.mean(brute_force(train, held_out, n, 3)[1:]) for n in (1, 2)]
  np.testing.assert_allclose([unigram, bigram], np.exp2(bits))


def test_orders_that_do_not_fit_a_number_are_an_error():
  with pytest.raises(ValueError, match=r"65536 symbols to the order 4 must be below 2 \*\* 63"):
    ngram.witten_bell(np.zeros(5), np.zeros(5), 4, 65536)
  assert ngram.witten_bell(np.zeros(5), np.zeros(5), 7, 256).shape == (7, 5)


def test_an_empty_training_text_is_an_error():
  with pytest.raises(ValueError, match="the training text is empty"):
    ngram.byte_bits(b"", b"text")


def test_xz_bits():
  noise = random.Random(0).randbytes(100_000)
  assert 8 < ngram.xz_bits(noise) < 8.1
  assert ngram.xz_bits(b"a" * 100_000) < 0.05
  assert ngram.xz_bits(noise) == 8 * len(lzma.compress(noise, preset=9 | lzma.PRESET_EXTREME)) / 1e5


def test_baselines_of_a_dataset(tmp_path):
  tokenizer = tokenise.ByteTokenizer()
  rng = random.Random(0)
  words = ["trellis ", "memory ", "state ", "slot ", "\N{GREEK SMALL LETTER BETA} "]
  texts = {s: "".join(rng.choices(words, k=400)) for s in ("train", "validation", "test")}
  files = {}
  for split, text in texts.items():
    path = tmp_path / f"{split}.tok"
    names = {"tokenizer": "byte", "tokenizer_digest": "", "corpus": ""}
    with TokenWriter(path, vocab_size=257, separator=256, **names) as w:
      for part in (text[:1000], text[1000:]):
        w.append(tokenizer.encode(part), len(part.encode()))
    files[split] = TokenFile(path)
  table = {
    name: (value, unit) for name, value, unit in ngram.baselines(Dataset(tokenizer, **files))
  }
  train, test = texts["train"].encode(), texts["test"].encode()
  for n in range(1, 7):
    expected = np.mean(brute_force(train, test, n, 256))
    assert table[f"byte {n}-gram"] == (pytest.approx(expected), "bits/byte")
  assert table["xz -9e"] == (ngram.xz_bits(test), "bits/byte")
  # With a byte tokenizer, the token baselines are the byte ones but for two ends of documents.
  assert table["token unigram"][0] == pytest.approx(2 ** table["byte 1-gram"][0], rel=0.05)
  assert table["token bigram"][0] == pytest.approx(2 ** table["byte 2-gram"][0], rel=0.05)
  assert len(table) == 9

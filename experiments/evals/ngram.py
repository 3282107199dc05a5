"""Baselines that anyone can check: n-grams of tokens and of bytes, and xz.

An n-gram of order n predicts a symbol w from the n - 1 before it, h, with Witten-Bell smoothing:

    p_n(w | h) = (count(h w) + types(h) p_{n-1}(w | h')) / (count(h) + types(h))

where h' is h without its oldest symbol, count(h) the occurrences of h with a symbol after it and
types(h) the number of different symbols after it, all in the training text; p_0 is uniform, and
p_n(. | h) = p_{n-1}(. | h') for an h that never occurred. Nothing is tuned. The first symbols of
the held-out text use the orders for which it has enough context.

Tokens are the stream of a token file, whose first separator nobody predicts: perplexity over
exactly the targets of a model. Bytes are the documents' texts one after the other: bits per byte.
xz is the size of the held-out bytes alone under `xz -9e`, in bits per byte of them.

`python -m experiments.evals.ngram --config=FILE` prints the table of a config's data.
"""

import lzma
import sys

import numpy as np
import tabulate

from experiments import data

MAX_ORDER = 6
# What is read of a large corpus, so that the baselines take a minute and a few gigabytes at most.
MAX_TRAIN, MAX_HELD_OUT = 1 << 25, 1 << 23  # symbols


def witten_bell(
  train: np.ndarray, held_out: np.ndarray, max_order: int, vocab_size: int
) -> np.ndarray:
  """The information of every held-out symbol under each order, in bits.

  Args:
    train: integers [N] in [0, vocab_size).
    held_out: integers [S].
    max_order: the largest n; vocab_size ** max_order must be below 2 ** 63.
    vocab_size: number of symbols.

  Returns:
    float64 [max_order, S]; row n - 1 is -log2 p_n of every symbol.
  """
  if vocab_size**max_order >= 1 << 63:
    raise ValueError(f"{vocab_size} symbols to the order {max_order} must be below 2 ** 63")
  if not len(train):
    raise ValueError("the training text is empty; n-grams need at least one symbol")
  train, held_out = np.asarray(train, np.int64), np.asarray(held_out, np.int64)
  p = np.full(len(held_out), 1 / vocab_size)
  bits = np.empty((max_order, len(held_out)))
  # An n-gram is the number that its symbols spell, the oldest first; one per place where it ends.
  train_grams, held_grams = np.zeros(len(train) + 1, np.int64), np.zeros(len(p) + 1, np.int64)
  for n in range(1, max_order + 1):
    train_grams = train_grams[:-1] * vocab_size + train[n - 1 :]
    held_grams = held_grams[:-1] * vocab_size + held_out[n - 1 :]
    if len(train_grams) and len(held_grams):
      p[n - 1 :] = _interpolate(train_grams, held_grams, p[n - 1 :], vocab_size)
    bits[n - 1] = -np.log2(p)
  return bits


def _interpolate(train, held_out, lower, vocab_size) -> np.ndarray:
  """p_n of the held-out n-grams from the training ones and from p_{n-1}."""
  grams, counts = np.unique(train, return_counts=True)
  histories, first = np.unique(grams // vocab_size, return_index=True)
  totals = np.add.reduceat(counts, first)
  types = np.diff(first, append=len(grams))
  count = _look_up(grams, counts, held_out)
  total = _look_up(histories, totals, held_out // vocab_size)
  kinds = _look_up(histories, types, held_out // vocab_size)
  seen = total > 0
  return np.where(seen, (count + kinds * lower) / np.where(seen, total + kinds, 1), lower)


def _look_up(keys, values, queries) -> np.ndarray:
  """values[keys == query] for every query, 0 where there is none; keys are sorted."""
  at = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
  return np.where(keys[at] == queries, values[at], 0)


def token_perplexities(
  train: np.ndarray, held_out: np.ndarray, vocab_size: int
) -> tuple[float, float]:
  """Unigram and bigram perplexity of a token stream, without its first separator."""
  bits = witten_bell(train, held_out, 2, vocab_size)[:, 1:]
  unigram, bigram = 2 ** bits.mean(1)
  return float(unigram), float(bigram)


def byte_bits(train: bytes, held_out: bytes, max_order: int = MAX_ORDER) -> np.ndarray:
  """Bits per byte of held-out text under byte n-grams, float64 [max_order], from order 1."""
  train, held_out = np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8)
  return witten_bell(train, held_out, max_order, 256).mean(1)


def xz_bits(text: bytes) -> float:
  """Bits per byte of a text compressed alone, as `xz -9e` does."""
  return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def baselines(dataset: data.Dataset, split: str = "test") -> list[tuple[str, float, str]]:
  """All baselines of a split, trained on the train split: (name, value, unit) in table order."""
  train, held_out = dataset.train, dataset.splits[split]
  unigram, bigram = token_perplexities(
    train.tokens[:MAX_TRAIN], held_out.tokens[:MAX_HELD_OUT], train.header.vocab_size
  )
  held_out_text = data.text(held_out, dataset.tokenizer, MAX_HELD_OUT)
  bits = byte_bits(data.text(train, dataset.tokenizer, MAX_TRAIN), held_out_text)
  return [
    ("token unigram", unigram, "perplexity"),
    ("token bigram", bigram, "perplexity"),
    *((f"byte {n}-gram", float(b), "bits/byte") for n, b in enumerate(bits, 1)),
    ("xz -9e", xz_bits(held_out_text), "bits/byte"),
  ]


def main(config) -> None:
  """Prints the baselines of a config's test split."""
  table = baselines(data.load_text(config.data))
  print(tabulate.tabulate(table, ["test split", "value", "unit"], floatfmt=".3f"))


if __name__ == "__main__":
  sys.exit(data.run_command(main))

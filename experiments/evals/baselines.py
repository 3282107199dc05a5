"""The baselines of a report, on exactly the targets that a model was evaluated on, kept on disk."""

import contextlib
import dataclasses
import hashlib
import math
import os
import pathlib
import zipfile

import numpy as np

from experiments import data, tokenise
from experiments.evals import ngram


@dataclasses.dataclass(frozen=True)
class Baselines:
  """What needs no model, on the first targets of a split's token stream; see evals/ngram.py."""

  token_bits: np.ndarray  # [2, targets] information of each under the token unigram and bigram
  byte_bits: np.ndarray  # [orders] bits per byte of byte n-grams, from order 1
  xz_bits: np.ndarray  # [] bits per byte
  num_bytes: np.ndarray  # [] utf-8 bytes of the targets

  @property
  def targets(self) -> int:
    return self.token_bits.shape[1]

  def perplexity(self, order: int, where: np.ndarray | slice = slice(None)) -> float:
    """Perplexity of the token n-gram of order 1 or 2, on some of the targets."""
    return 2 ** float(self.token_bits[order - 1, where].mean(dtype=np.float64))

  def rows(self) -> dict[str, dict[str, float]]:
    """Perplexity per token, of those that have one, and bits per byte of each baseline."""
    rows = {}
    for order, name in enumerate(("token unigram", "token bigram"), 1):
      perplexity = self.perplexity(order)
      bits = math.log2(perplexity) * self.targets / int(self.num_bytes)
      rows[name] = {"perplexity": perplexity, "bits_per_byte": bits}
    for order, bits in enumerate(self.byte_bits, 1):
      rows[f"byte {order}-gram"] = {"bits_per_byte": float(bits)}
    rows["xz -9e"] = {"bits_per_byte": float(self.xz_bits)}
    return rows


def load(dataset: data.Dataset, split: str, targets: int) -> Baselines:
  """The baselines on a split's first `targets` targets, at most ngram.MAX_HELD_OUT of them.

  They are kept beside the split's token file under a hash of all that they depend on: both files'
  tokens, the tokenizer and the program that computes them.
  """
  path = _path(dataset, split, tokens := _tokens(dataset, split, targets))
  names = [field.name for field in dataclasses.fields(Baselines)]
  # Absent or unreadable, they are computed again.
  unreadable = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
  with contextlib.suppress(*unreadable), np.load(path) as f:
    return Baselines(**{name: f[name] for name in names})
  result = _compute(dataset, split, tokens)
  with contextlib.suppress(OSError):  # a folder that is not ours to write
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as f:
      np.savez(f, **dataclasses.asdict(result))
    os.replace(partial, path)
  return result


def _tokens(dataset: data.Dataset, split: str, targets: int) -> np.ndarray:
  """The first targets and the separator before them."""
  return dataset.splits[split].tokens[: min(targets, ngram.MAX_HELD_OUT) + 1]


def _path(dataset: data.Dataset, split: str, tokens: np.ndarray) -> pathlib.Path:
  key = hashlib.sha256(pathlib.Path(ngram.__file__).read_bytes())
  key.update(tokenise.digest(dataset.tokenizer).encode())
  for part in (dataset.train.tokens[: ngram.MAX_TRAIN], tokens):
    key.update(b"%d " % len(part) + part.tobytes())
  return dataset.splits[split].path.with_name(f"baselines-{split}-{key.hexdigest()[:12]}.npz")


def _compute(dataset: data.Dataset, split: str, tokens: np.ndarray) -> Baselines:
  train = dataset.train
  bits = ngram.witten_bell(train.tokens[: ngram.MAX_TRAIN], tokens, 2, train.header.vocab_size)
  size = int(tokenise.token_bytes(dataset.tokenizer)[tokens[1:]].sum())
  text = data.text(dataset.splits[split], dataset.tokenizer, size)
  train_text = data.text(train, dataset.tokenizer, ngram.MAX_TRAIN)
  return Baselines(
    token_bits=bits[:, 1:].astype(np.float32),  # nobody predicts the first separator
    byte_bits=ngram.byte_bits(train_text, text),
    xz_bits=np.asarray(ngram.xz_bits(text)),
    num_bytes=np.asarray(size),
  )

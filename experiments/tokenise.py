"""Tokenizers: bytes, a BPE trained on the corpus, or any `tokenizer.json`.

All of them have one special token, the end of a document, which also stands before the first
document: it is what a model sees before a text begins, so `bos_id == eos_id`. A text that spells
the special token out is encoded as the ordinary characters that it is.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from experiments.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
# What published tokenizers call it, in the order in which they are looked for.
END_OF_DOCUMENT_NAMES = (
  END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]",
)  # fmt: skip
MIN_BPE_VOCABULARY = 256 + 1
MAX_BPE_TRAINING = 1 << 28  # characters; more text hardly moves the merges and takes minutes


class Tokenizer(Protocol):
  """What the rest of the project needs of a tokenizer."""

  name: str
  vocab_size: int
  eos_id: int  # ends a document
  bos_id: int  # stands before a text; the same token

  def encode(self, text: str) -> list[int]: ...
  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
  def decode(self, ids: Sequence[int]) -> str: ...
  def to_json(self) -> str: ...


class ByteTokenizer:
  """Token i < 256 is the utf-8 byte i; 256 ends a document."""

  name = "byte"
  vocab_size = 257
  bos_id = eos_id = 256

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids` without ends of documents; a broken character becomes U+FFFD."""
    _check_ids(ids, self.vocab_size)
    return bytes(i for i in ids if i < 256).decode(errors="replace")

  def to_json(self) -> str:
    return json.dumps({"byte_tokenizer": self.vocab_size})


class JsonTokenizer:
  """A tokenizer of the `tokenizers` library, which is what a `tokenizer.json` holds."""

  def __init__(self, inner: tokenizers.Tokenizer, name: str):
    self.name = name
    self.inner = inner
    inner.no_padding()
    inner.no_truncation()
    vocabulary = inner.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
    end = next((n for n in END_OF_DOCUMENT_NAMES if n in vocabulary), None)
    if end is None:
      names = ", ".join(END_OF_DOCUMENT_NAMES)
      raise UserError(f"tokenizer {name!r} has no end-of-document token; accepted are {names}")
    self.bos_id = self.eos_id = vocabulary[end]
    inner.add_special_tokens([end])  # where it was an ordinary token; adds no id
    inner.encode_special_tokens = True  # special tokens are not found in texts

  def encode(self, text: str) -> list[int]:
    return self.inner.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Encodes on all cores."""
    return [e.ids for e in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids` without special tokens; a broken character becomes U+FFFD."""
    _check_ids(ids, self.vocab_size)
    return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)

  def to_json(self) -> str:
    return self.inner.to_str()


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
  """Trains a byte-level BPE on at most MAX_BPE_TRAINING characters; the same texts, the same BPE.

  Args:
    texts: training documents, streamed.
    vocab_size: tokens in all: 256 bytes, the end of a document, merges. A tiny corpus may have
      fewer merges to offer, so read the tokenizer's own `vocab_size`.
  """
  check_vocab_size(vocab_size)
  inner = tokenizers.Tokenizer(models.BPE())
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_DOCUMENT],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  inner.train_from_iterator(_at_most(texts, MAX_BPE_TRAINING), trainer)
  return JsonTokenizer(inner, f"bpe-{vocab_size}")


def check_vocab_size(vocab_size: int) -> None:
  """Raises UserError when a BPE of this size could not hold every byte."""
  if vocab_size < MIN_BPE_VOCABULARY:
    raise UserError(
      f"data.vocab_size={vocab_size} is too small for a BPE, which needs at least"
      f" {MIN_BPE_VOCABULARY}: 256 bytes and the end of a document"
    )


def load(path: str | os.PathLike, name: str = "") -> Tokenizer:
  """Reads a tokenizer that `save` wrote, or any `tokenizer.json`.

  Args:
    path: the file.
    name: for people and headers; by default the path.

  Raises:
    UserError: the file does not exist, is no tokenizer or has no end-of-document token.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"tokenizer {str(path)!r} does not exist")
  text = path.read_text(encoding="utf-8", errors="replace")
  if text == ByteTokenizer().to_json():
    return ByteTokenizer()
  try:
    inner = tokenizers.Tokenizer.from_str(text)
  except Exception as e:  # the library raises bare Exception
    raise UserError(f"{path} is not a tokenizer.json ({e})") from None
  return JsonTokenizer(inner, name or str(path))


def save(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
  """Writes a tokenizer so that `load` gives it back; a kill in the middle leaves no file."""
  partial = pathlib.Path(f"{path}.{os.getpid()}.partial")
  partial.write_text(tokenizer.to_json(), encoding="utf-8")
  os.replace(partial, path)


def digest(tokenizer: Tokenizer) -> str:
  """Hash of everything that decides how the tokenizer encodes."""
  return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
  """The number of utf-8 bytes each token stands for, int32 [vocab]; special tokens have 0.

  Summed over a document's tokens it is the document's exact size for bytes and byte-level BPE
  without a normalizer; for other kinds of tokenizers it is an estimate from the tokens' spelling.
  """
  sizes = np.zeros(tokenizer.vocab_size, np.int32)
  if isinstance(tokenizer, ByteTokenizer):
    sizes[:256] = 1
    return sizes
  inner = tokenizer.inner
  byte_level = '"ByteLevel"' in json.dumps(json.loads(inner.to_str())["decoder"])
  for token, i in inner.get_vocab(with_added_tokens=False).items():
    if byte_level:
      sizes[i] = len(token)  # byte-level BPE spells every byte as one character
    elif len(token) == 6 and token.startswith("<0x"):
      sizes[i] = 1
    else:
      sizes[i] = len(token.removeprefix("##").replace("\u2581", " ").encode())
  for i, added in inner.get_added_tokens_decoder().items():
    sizes[i] = 0 if added.special else len(added.content.encode())
  return sizes


def _at_most(texts: Iterable[str], limit: int) -> Iterator[str]:
  """The first texts, until they hold `limit` characters."""
  for text in texts:
    yield text
    if (limit := limit - len(text)) <= 0:
      return


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
  bad = [int(i) for i in ids if not 0 <= i < vocab_size]
  if bad:
    raise UserError(f"token id {bad[0]} is outside the vocabulary of {vocab_size} tokens")

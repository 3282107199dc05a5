"""Tokenizers: lossless, deterministic, byte counts exact, and one sentence per bad input."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from experiments import tokenise
from experiments.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
TEXTS = ["def f(x):\n    return x\n" * 5, "class A:\n\tpass\r\n", "naïve 漢字 😀 " * 3]
BPE = tokenise.train_bpe(TEXTS, 280)
TOKENIZERS = {"byte": tokenise.ByteTokenizer(), "bpe": BPE}

# Text that looks like what the tokenizers were trained on, and text that looks like nothing.
SOME_TEXT = st.one_of(
  st.text(), st.lists(st.sampled_from([*TEXTS, "\0", "<|endoftext|>"])).map("".join)
)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=SOME_TEXT)
def test_round_trip_is_lossless_and_byte_counts_are_exact(kind, text):
  tokenizer = TOKENIZERS[kind]
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
  assert tokenizer.eos_id not in ids  # a text cannot spell the end of a document
  sizes = tokenise.token_bytes(tokenizer)
  assert sizes.shape == (tokenizer.vocab_size,)
  assert sizes[ids].sum() == len(text.encode())
  assert sizes[tokenizer.eos_id] == 0


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_batch_is_its_texts(kind):
  tokenizer = TOKENIZERS[kind]
  assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_half_a_character_becomes_a_replacement(kind):
  ids = TOKENIZERS[kind].encode("a\N{CROCODILE}")
  assert len(ids) >= 4
  assert TOKENIZERS[kind].decode(ids[:-1]).rstrip("\ufffd") == "a"


def test_bpe_compresses_and_has_the_size_asked_for():
  assert BPE.vocab_size == 280
  assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_a_tiny_corpus_gives_a_smaller_bpe():
  assert tokenise.train_bpe(["ab"], 1000).vocab_size < 260


def test_bpe_training_is_deterministic_across_processes_and_threads():
  code = """if True:
    import json, sys
    from experiments import tokenise
    print(tokenise.digest(tokenise.train_bpe(json.loads(sys.argv[1]), 280)))
  """
  command = [sys.executable, "-c", code, json.dumps(TEXTS)]
  for threads in ("1", "4"):
    env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
    out = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == tokenise.digest(BPE), out.stderr


def test_bpe_reads_no_more_text_than_it_needs(monkeypatch):
  monkeypatch.setattr(tokenise, "MAX_BPE_TRAINING", 25)
  read = []
  tokenise.train_bpe((read.append(i) or "0123456789" for i in range(100)), 300)
  assert read == [0, 1, 2]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_saved_is_loaded(tmp_path, kind):
  tokenise.save(TOKENIZERS[kind], tmp_path / "tokenizer.json")
  loaded = tokenise.load(tmp_path / "tokenizer.json", "name")
  assert tokenise.digest(loaded) == tokenise.digest(TOKENIZERS[kind])
  text = "".join(TEXTS) + "<|endoftext|>"
  assert loaded.encode(text) == TOKENIZERS[kind].encode(text)
  assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_digests_tell_tokenizers_apart():
  kinds = [*TOKENIZERS.values(), tokenise.train_bpe(TEXTS, 281), tokenise.train_bpe(TEXTS[1:], 280)]
  assert len({tokenise.digest(t) for t in kinds}) == 4


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "tokenizer.json"
  path.write_text("old")
  monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
  with pytest.raises(KeyboardInterrupt):
    tokenise.save(BPE, path)
  assert path.read_text() == "old"


def word_level(end):
  inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, end: 7, "[UNK]": 3}, "[UNK]"))
  inner.pre_tokenizer = pre_tokenizers.Whitespace()
  return inner


@pytest.mark.parametrize("end", tokenise.END_OF_DOCUMENT_NAMES)
def test_any_tokenizer_json_is_accepted(tmp_path, end):
  inner = word_level(end)
  inner.enable_truncation(2)  # published files do both; a corpus must not be cut or padded
  inner.enable_padding(length=8)
  inner.save(str(tmp_path / "t.json"))
  tokenizer = tokenise.load(tmp_path / "t.json")
  assert tokenizer.encode("a b a") == [0, 1, 0]
  assert tokenizer.encode_batch(["a b a", "b"]) == [[0, 1, 0], [1]]
  assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (7, 7, 8)
  assert tokenizer.decode([0, 7, 1]) == "a b"
  again = tokenise.load(tmp_path / "t.json")
  assert tokenise.digest(again) == tokenise.digest(tokenizer)


def test_byte_counts_of_other_tokenizers_follow_their_spelling():
  vocabulary = {"</s>": 0, "<0xC3>": 1, "\u2581the": 2, "##ing": 3, "é": 4}
  inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, "é"))
  inner.add_tokens(["naïve"])
  inner.add_special_tokens(["<s>"])
  sizes = tokenise.token_bytes(tokenise.JsonTokenizer(inner, "test"))
  np.testing.assert_array_equal(sizes, [0, 1, 4, 3, 2, 6, 0])


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("off", [-1, 0])
def test_an_id_out_of_range_is_an_error(kind, off):
  tokenizer = TOKENIZERS[kind]
  bad = tokenizer.vocab_size if off == 0 else -1
  with pytest.raises(UserError, match=f"token id {bad} is outside the vocabulary of"):
    tokenizer.decode([0, bad])


@pytest.mark.parametrize("size", [256, 0, -5])
def test_too_small_a_vocabulary_is_an_error(size):
  with pytest.raises(UserError, match=f"data.vocab_size={size} is too small .* at least 257"):
    tokenise.train_bpe(TEXTS, size)
  assert tokenise.train_bpe(TEXTS, 257).vocab_size == 257


def test_bad_tokenizer_files_are_one_sentence(tmp_path):
  with pytest.raises(UserError, match=r"tokenizer '.*/absent\.json' does not exist"):
    tokenise.load(tmp_path / "absent.json")
  for content in ("", "{}", "not json", '{"byte_tokenizer": 1}'):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError, match=r"bad\.json is not a tokenizer\.json"):
      tokenise.load(tmp_path / "bad.json")
  word_level("[END]").save(str(tmp_path / "no_end.json"))
  with pytest.raises(UserError, match=r"no end-of-document token; accepted are <\|endoftext\|>"):
    tokenise.load(tmp_path / "no_end.json")

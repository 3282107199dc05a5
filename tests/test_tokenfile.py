"""The token file: what is written is read, anything else is noticed and named."""

import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import tokenfile
from experiments.errors import UserError
from experiments.tokenfile import HEADER_BYTES, TokenFile, TokenWriter

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 1]]


def writer(path, vocab_size=10, separator=0, corpus="a corpus"):
  return TokenWriter(
    path,
    vocab_size=vocab_size,
    separator=separator,
    tokenizer="a tokenizer",
    tokenizer_digest="d" * 64,
    corpus=corpus,
  )


def write(path, documents=DOCUMENTS, **kwargs):
  with writer(path, **kwargs) as w:
    for document in documents:
      w.append(document, 3 * len(document))
    w.set_corpus_digest("c" * 64)
  return path


@settings(max_examples=30)
@given(
  documents=st.lists(st.lists(st.integers(1, 256), min_size=1), min_size=1),
  vocab_size=st.sampled_from([257, 1 << 16, (1 << 16) + 1]),
)
def test_what_is_written_is_read(tmp_path_factory, documents, vocab_size):
  path = write(tmp_path_factory.mktemp("t") / "a.tok", documents, vocab_size=vocab_size)
  file = TokenFile(path)
  stream = [0]
  for document in documents:
    stream += [*document, 0]
  np.testing.assert_array_equal(file.tokens, stream)
  assert [file.document(i).tolist() for i in range(file.num_documents)] == documents
  np.testing.assert_array_equal(file.document_bytes, [3 * len(d) for d in documents])
  assert file.num_bytes == file.header.num_bytes == 3 * sum(map(len, documents))
  assert file.num_tokens == file.header.num_tokens == len(stream)
  assert file.tokens.dtype == (np.uint32 if vocab_size > 1 << 16 else np.uint16)


def test_header_says_what_the_file_is(tmp_path):
  header = TokenFile(write(tmp_path / "a.tok")).header
  assert (header.vocab_size, header.separator, header.num_documents) == (10, 0, 4)
  assert (header.corpus, header.corpus_digest) == ("a corpus", "c" * 64)
  assert (header.tokenizer, header.tokenizer_digest) == ("a tokenizer", "d" * 64)


def test_header_holds_any_name(tmp_path):
  file = TokenFile(write(tmp_path / "a.tok", corpus="\U0001f40a" * 5000))
  assert set(file.header.corpus) == {"\U0001f40a"}


def test_tokens_are_mapped_not_read(tmp_path):
  file = TokenFile(write(tmp_path / "a.tok"))
  assert not file.tokens.flags.owndata
  with pytest.raises(ValueError, match="read-only"):
    file.tokens[0] = 1


@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize("last", range(5))
def test_a_range_of_documents_is_a_token_file(tmp_path, first, last):
  file = TokenFile(write(tmp_path / "a.tok"), documents=slice(first, max(first, last)))
  expected = DOCUMENTS[first : max(first, last)]
  assert [file.document(i).tolist() for i in range(file.num_documents)] == expected
  assert file.tokens.tolist() == [0] + [t for d in expected for t in [*d, 0]]
  assert file.offsets[0] == 0 and file.offsets[-1] == file.num_tokens - 1
  assert file.num_bytes == 3 * sum(map(len, expected))


def test_pickled_by_name_not_by_content(tmp_path):
  path = write(tmp_path / "a.tok", [[1] * 100_000, [2, 3]])
  file = TokenFile(path, documents=slice(0, 1))
  data = pickle.dumps(file)
  assert len(data) < 1000
  np.testing.assert_array_equal(pickle.loads(data).tokens, file.tokens)


def test_empty_documents_are_left_out(tmp_path):
  assert TokenFile(write(tmp_path / "a.tok", [[], [1], []])).num_documents == 1


@pytest.mark.parametrize("bad", [10, -1, 1 << 40])
def test_an_id_outside_the_vocabulary_is_an_error_and_leaves_nothing(tmp_path, bad):
  with pytest.raises(UserError, match=f"token id {bad} is outside the vocabulary of 10 tokens"):
    write(tmp_path / "a.tok", [[1], [2, bad]])
  assert os.listdir(tmp_path) == []


def test_no_document_is_an_error_and_leaves_nothing(tmp_path):
  with pytest.raises(UserError, match=r"a\.tok would hold no document"):
    write(tmp_path / "a.tok", [])
  assert os.listdir(tmp_path) == []


def test_nothing_is_seen_before_the_end_and_the_old_file_stays(tmp_path):
  path = write(tmp_path / "a.tok", [[7]])
  with pytest.raises(KeyboardInterrupt), writer(path) as w:
    w.append([1, 2, 3], 3)
    assert TokenFile(path).document(0).tolist() == [7]
    raise KeyboardInterrupt
  assert TokenFile(path).document(0).tolist() == [7]
  assert os.listdir(tmp_path) == ["a.tok"]


def test_a_killed_writer_leaves_nothing_that_opens(tmp_path):
  code = """if True:
    import os, signal, sys
    from experiments.tokenfile import TokenWriter
    names = dict(tokenizer="", tokenizer_digest="", corpus="")
    with TokenWriter(sys.argv[1], vocab_size=10, separator=0, **names) as w:
      for _ in range(10_000):
        w.append([1, 2, 3], 3)
      w._file.flush()
      os.kill(os.getpid(), signal.SIGKILL)
  """
  path = tmp_path / "a.tok"
  killed = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT)
  assert killed.returncode == -signal.SIGKILL
  (left,) = tmp_path.iterdir()
  assert left.stat().st_size > 60_000
  for name in (path, left):
    with pytest.raises(UserError, match=r"does not exist|is not a token file"):
      TokenFile(name)


def test_any_changed_byte_is_noticed(tmp_path, monkeypatch):
  monkeypatch.setattr(tokenfile, "BLOCK", 16)  # several blocks, the last tokens in the midst of one
  path = write(tmp_path / "a.tok")
  data = path.read_bytes()
  for at in range(len(data)):
    path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
    with pytest.raises(UserError, match=r"a\.tok"):
      TokenFile(path)
  path.write_bytes(data)
  TokenFile(path)


def test_any_other_length_is_noticed(tmp_path):
  path = write(tmp_path / "a.tok")
  data = path.read_bytes()
  for size in [*range(0, HEADER_BYTES, 501), *range(HEADER_BYTES, len(data))]:
    path.write_bytes(data[:size])
    with pytest.raises(UserError, match=r"is truncated|is not a token file"):
      TokenFile(path, verify=False)
  path.write_bytes(data + b"\0")
  with pytest.raises(UserError, match=r"a\.tok is too long: 4,201 bytes, its header says 4,200"):
    TokenFile(path)


def rewrite_header(path, **fields):
  """Changes header fields as another program would that computes the checksum right."""
  data = path.read_bytes()
  old = json.loads(data[:HEADER_BYTES])
  header, _ = tokenfile._read_header(path)
  header = tokenfile.Header(**{k: fields.get(k, v) for k, v in vars(header).items()})
  line = header.to_bytes(header.checksum(tokenfile.zlib.crc32(data[HEADER_BYTES:])))
  if "version" in fields:
    line = line.replace(b'"version":%d' % old["version"], b'"version":%d' % fields["version"])
  path.write_bytes(line + data[HEADER_BYTES:])


def test_a_vocabulary_smaller_than_a_token_id_is_an_error(tmp_path):
  path = write(tmp_path / "a.tok")
  rewrite_header(path, vocab_size=10)
  TokenFile(path)
  rewrite_header(path, vocab_size=9)
  with pytest.raises(UserError, match=r"a\.tok holds token id 9, .* a vocabulary of 9"):
    TokenFile(path)


def test_another_version_is_an_error(tmp_path):
  path = write(tmp_path / "a.tok")
  rewrite_header(path, version=2)
  with pytest.raises(UserError, match=r"a\.tok has version 2; this program reads version 1"):
    TokenFile(path)


def test_other_files_are_errors(tmp_path):
  with pytest.raises(UserError, match=r"token file '.*/absent\.tok' does not exist"):
    TokenFile(tmp_path / "absent.tok")
  (tmp_path / "a.tok").write_text("words")
  with pytest.raises(UserError, match=r"a\.tok is not a token file"):
    TokenFile(tmp_path / "a.tok")
  (tmp_path / "a.tok").write_text(f'{{"format":"{tokenfile.FORMAT}"}}'.ljust(HEADER_BYTES))
  with pytest.raises(UserError, match=r"the header of .*a\.tok is corrupt"):
    TokenFile(tmp_path / "a.tok")

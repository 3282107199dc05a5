"""Preparing token files: what they hold, when they are made again, what stops it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import types

import pytest

from experiments import data, tokenise
from experiments.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
SEPARATOR = 0


@pytest.fixture
def config(tmp_path):
  folder = tmp_path / "corpus"
  folder.mkdir()
  for i in range(20):
    (folder / f"{i}.txt").write_text(f"def naïve_{i}(x):\n  return x + {i}\n" * (i + 1))
  return types.SimpleNamespace(
    path=str(folder),
    text_field="text",
    tokenizer="bpe",
    vocab_size=300,
    cache=str(tmp_path / "cache"),
    task="",
  )


def all_text(dataset):
  return {split: data.text(f, dataset.tokenizer) for split, f in dataset.splits.items()}


def mtimes(config):
  return {p: p.stat().st_mtime_ns for p in pathlib.Path(config.cache).rglob("*.*")}


@pytest.mark.parametrize("kind", ["bpe", "byte", "json"])
def test_prepared_files_hold_the_corpus(config, tmp_path, kind):
  config.tokenizer = kind
  if kind == "json":
    config.tokenizer = str(tmp_path / "tokenizer.json")
    tokenise.save(tokenise.train_bpe(["return x"], 260), config.tokenizer)
  dataset = data.load(config)
  files = [p.read_bytes() for p in pathlib.Path(config.path).iterdir()]
  sizes = tokenise.token_bytes(dataset.tokenizer)
  total = 0
  for file in dataset.splits.values():
    assert file.header.vocab_size == dataset.tokenizer.vocab_size
    assert file.header.corpus == config.path
    for i in range(file.num_documents):
      text = dataset.tokenizer.decode(file.document(i)).encode()
      files.remove(text)
      assert file.document_bytes[i] == len(text) == sizes[file.document(i)].sum()
    total += file.num_bytes
  assert not files
  assert total == sum(len(text) for text in all_text(dataset).values())
  assert len({f.header.corpus_digest for f in dataset.splits.values()}) == 1


def test_text_is_limited_in_bytes(config):
  dataset = data.load(config)
  whole = data.text(dataset.train, dataset.tokenizer)
  for limit in (0, 1, 500, len(whole), len(whole) + 1):
    assert data.text(dataset.train, dataset.tokenizer, limit) == whole[:limit]


def test_files_are_prepared_once_and_again_when_something_changes(config):
  data.load(config)
  before = mtimes(config)
  data.load(config)
  assert mtimes(config) == before
  digests = {data.load(config).train.header.corpus_digest}
  config.vocab_size = 290
  assert data.load(config).tokenizer.vocab_size == 290
  config.tokenizer = "byte"
  digests.add(data.load(config).train.header.corpus_digest)
  config.vocab_size = 1000  # says nothing to a byte tokenizer
  data.load(config)
  assert len(list(pathlib.Path(config.cache).iterdir())) == 3
  assert len(digests) == 1
  pathlib.Path(config.path, "0.txt").write_text("something else")
  assert data.load(config).train.header.corpus_digest not in digests
  assert before.items() <= mtimes(config).items()


def test_another_tokenizer_of_the_same_name_is_another_cache(config, tmp_path):
  config.tokenizer = str(tmp_path / "tokenizer.json")
  for size in (270, 280):
    tokenise.save(tokenise.train_bpe(["def naïve(x): return x"] * 9, size), config.tokenizer)
    assert data.load(config).train.header.vocab_size == tokenise.load(config.tokenizer).vocab_size
  assert len(list(pathlib.Path(config.cache).iterdir())) == 2


def test_the_same_corpus_gives_the_same_bytes(config, tmp_path):
  data.load(config)
  first = {p.name: p.read_bytes() for p in pathlib.Path(config.cache).rglob("*.*")}
  config.cache = str(tmp_path / "another")
  data.load(config)
  assert first == {p.name: p.read_bytes() for p in pathlib.Path(config.cache).rglob("*.*")}


def test_a_malformed_line_leaves_nothing_half_written(config, tmp_path):
  lines = [json.dumps({"text": f"document {i}"}) for i in range(100)]
  pathlib.Path(config.path, "a.jsonl").write_text("\n".join([*lines, "{"]))
  for config.tokenizer in ("bpe", "byte"):
    with pytest.raises(UserError, match=r"a\.jsonl:101: not a line of JSON"):
      data.load(config)
    left = {p.name for p in pathlib.Path(config.cache).rglob("*.*")}
    assert left <= {".lock", "tokenizer.json"}


def test_an_empty_split_is_named_and_leaves_nothing(config, tmp_path):
  config.path = str(tmp_path / "a.jsonl")
  pathlib.Path(config.path).write_text('{"text": "one document"}')
  config.tokenizer = "byte"
  with pytest.raises(
    UserError, match=r"a\.jsonl' leaves the \w+ split empty \(1 documents in all\)"
  ):
    data.load(config)
  assert not list(pathlib.Path(config.cache).rglob("*.tok*"))


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("path", "/absent/file", "data.path: '/absent/file' does not exist"),
    ("path", "/absent/file.tok", "token file '/absent/file.tok' does not exist"),
    ("tokenizer", "bpee", "data.tokenizer='bpee'; accepted are 'bpe', 'byte' or a tokenizer.json"),
    ("tokenizer", "/absent.json", "tokenizer '/absent.json' does not exist"),
    ("vocab_size", 100, "data.vocab_size=100 is too small"),
  ],
)
def test_bad_config_is_one_sentence_and_writes_nothing(config, field, value, message):
  setattr(config, field, value)
  with pytest.raises(UserError, match=message):
    data.load(config)
  assert not os.path.exists(config.cache)


def cached(config, name):
  (path,) = pathlib.Path(config.cache).rglob(name)
  return path


def test_a_damaged_cache_is_named_with_the_way_out(config):
  data.load(config)
  path = cached(config, "test.tok")
  path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(UserError, match=r"test\.tok is truncated: .*; delete .* to prepare it again"):
    data.load(config)


def test_another_tokenizer_beside_the_token_files_is_noticed(config):
  data.load(config)
  tokenise.save(tokenise.ByteTokenizer(), cached(config, "tokenizer.json"))
  with pytest.raises(UserError, match=r"\.tok was made with another tokenizer \(bpe-300\)"):
    data.load(config)


PREPARE = """if True:
  import json, os, signal, sys, types
  from experiments import data
  if sys.argv[2] == "kill":
    finish = data.TokenWriter._finish
    def finish_one(writer):
      if len(killed) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
      killed.append(finish(writer))
    killed = []
    data.TokenWriter._finish = finish_one
  dataset = data.load(types.SimpleNamespace(**json.loads(sys.argv[1])))
  print(dataset.train.header.corpus_digest)
"""


def prepare(config, how="live"):
  command = [sys.executable, "-c", PREPARE, json.dumps(vars(config)), how]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_killed_preparation_is_done_again(config):
  assert prepare(config, "kill").wait() == -signal.SIGKILL
  left = [p.name for p in pathlib.Path(config.cache).rglob("*.*")]
  assert sum(name.endswith(".tok") for name in left) == 1
  assert sum(name.endswith(".partial") for name in left) == 2
  dataset = data.load(config)
  assert all(all_text(dataset).values())
  assert not list(pathlib.Path(config.cache).rglob("*.partial"))


def test_a_preparation_waits_for_another_one_of_the_same_files(config):
  data.load(config)
  paths = list(pathlib.Path(config.cache).rglob("*.tok"))
  for path in paths:
    path.unlink()
  thread = threading.Thread(target=data.load, args=[config])
  with data._lock(paths[0].parent):
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    assert not any(path.exists() for path in paths)
  thread.join(60)
  assert all(path.exists() for path in paths)


def test_two_processes_prepare_at_the_same_time(config):
  both = [prepare(config), prepare(config)]
  digests = {process.communicate(timeout=60)[0] for process in both}
  assert digests == {data.load(config).train.header.corpus_digest + "\n"}
  assert [process.returncode for process in both] == [0, 0]


def test_a_folder_of_ready_token_files_is_opened_as_it_is(config, tmp_path):
  expected = all_text(data.load(config))
  config.path = str(cached(config, "train.tok").parent)
  config.cache = str(tmp_path / "unused")
  assert all_text(data.load(config)) == expected
  config.tokenizer = str(cached(types.SimpleNamespace(cache=config.path), "tokenizer.json"))
  assert all_text(data.load(config)) == expected
  config.tokenizer = "byte"
  with pytest.raises(UserError, match=r"train\.tok was made with another tokenizer"):
    data.load(config)
  assert not os.path.exists(config.cache)


def test_a_ready_token_file_is_split_by_its_documents(config):
  ready = data.load(config)
  config.path = str(ready.train.path)
  dataset = data.load(config)
  assert b"".join(all_text(dataset).values()) == all_text(ready)["train"]
  count = ready.train.num_documents
  assert dataset.train.num_documents == count * 8 // 10
  assert dataset.validation.num_documents >= 1 and dataset.test.num_documents >= 1
  batch = next(data.loader(dataset.test, seq_len=8, batch_size=2, shuffle=False))
  assert batch["tokens"][0, 1:].tolist() == dataset.test.document(0)[:7].tolist()


def test_a_ready_token_file_too_short_to_split_is_an_error(config):
  config.path = str(data.load(config).test.path)
  with pytest.raises(
    UserError, match=r"test\.tok has \d documents; splitting it takes at least 10"
  ):
    data.load(config)


def test_command_prints_every_split(config, capsys):
  data.main(types.SimpleNamespace(data=config))
  out = capsys.readouterr().out
  for split, file in data.load(config).splits.items():
    (line,) = [line for line in out.splitlines() if line.startswith(split)]
    numbers = [f"{n:,}" for n in (file.num_documents, file.num_tokens, file.num_bytes)]
    assert line.split()[1:4] == numbers


def test_command_turns_a_mistake_into_one_sentence_and_exit_code_2(config, tmp_path):
  (tmp_path / "config.py").write_text(
    "import ml_collections\n"
    "def get_config():\n"
    f"  return ml_collections.ConfigDict({{'data': {vars(config)!r}}})\n"
  )
  command = [sys.executable, "-m", "experiments.data", f"--config={tmp_path / 'config.py'}"]
  for mistake, sentence in (
    ("--config.data.path=/absent", "error: data.path: '/absent' does not exist\n"),
    ("--config.data.pat=/absent", "error: config.data.pat is no field of the config; did you mean"),
  ):
    out = subprocess.run([*command, mistake], cwd=ROOT, capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr.startswith(sentence) and out.stderr.count("\n") == 1
  out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert out.returncode == 0 and "bytes/token" in out.stdout

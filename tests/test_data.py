"""Packing, loading, resuming and preparing: every token a target once, every state exact."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import data, tokenise
from experiments.errors import UserError
from experiments.packing import PACKINGS, Rows
from experiments.tokenfile import TokenFile, TokenWriter

ROOT = pathlib.Path(__file__).parents[1]
SEPARATOR = 0


def token_file(folder, lengths):
  """A token file whose tokens are 1, 2, 3, ... through all documents: each tells where it is."""
  path = folder / f"{len(list(folder.iterdir()))}.tok"
  names = {"tokenizer": "", "tokenizer_digest": "", "corpus": ""}
  numbers = itertools.count(1)
  with TokenWriter(path, vocab_size=1 << 17, separator=SEPARATOR, **names) as w:
    for length in lengths:
      w.append(list(itertools.islice(numbers, length)), length)
  return TokenFile(path)


def corpus_pairs(file):
  """Every (input, target, document) of a file, the separators' documents by hand."""
  return [
    (int(file.tokens[at]), int(file.tokens[at + 1]), d)
    for d in range(file.num_documents)
    for at in range(file.offsets[d], file.offsets[d + 1])
  ]


@st.composite
def packings(draw):
  lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=12))
  packing = draw(st.sampled_from(PACKINGS))
  align = draw(st.integers(0, 5)) if packing == "documents" else 0
  seq_len = max(align, 1) * draw(st.integers(1, 8))
  return lengths, seq_len, packing, align


@settings(max_examples=200, deadline=None)
@given(packings())
def test_every_token_is_a_target_exactly_once_and_none_crosses_a_document(tmp_path_factory, case):
  lengths, seq_len, packing, align = case
  file = token_file(tmp_path_factory.mktemp("t"), lengths)
  rows = Rows(file, seq_len, packing, align)
  expected = corpus_pairs(file)
  seen = []
  for row in (rows[i] for i in range(len(rows))):
    here = np.flatnonzero(row["weights"])
    seen += zip(row["tokens"][here].tolist(), row["targets"][here].tolist())
  assert seen == [(token, target) for token, target, _ in expected]


@settings(max_examples=200, deadline=None)
@given(packings())
def test_segments_are_documents_aligned_and_padded_at_the_end_only(tmp_path_factory, case):
  lengths, seq_len, packing, align = case
  file = token_file(tmp_path_factory.mktemp("t"), lengths)
  rows = Rows(file, seq_len, packing, align)
  pairs = iter(corpus_pairs(file))
  for i in range(len(rows)):
    row = rows[i]
    ids, weights = row["segment_ids"], row["weights"]
    assert {k: (v.dtype.name, v.shape) for k, v in row.items()} == {
      "tokens": ("int32", (seq_len,)),
      "targets": ("int32", (seq_len,)),
      "segment_ids": ("int32", (seq_len,)),
      "weights": ("float32", (seq_len,)),
    }
    used = np.count_nonzero(ids)
    assert used == seq_len or i == len(rows) - 1
    assert ids[0] == 1 and not ids[used:].any() and not weights[used:].any()
    assert set(np.diff(ids[:used])) <= {0, 1}
    if packing == "concat":
      assert used == weights.sum() and ids[:used].max() == 1
    segment_of, gap = {}, 0
    for at in range(used):
      gap = 0 if weights[at] else gap + 1
      assert gap < max(align, 1)
      if weights[at]:
        token, _, document = next(pairs)
        assert row["tokens"][at] == token
        if packing == "documents":
          assert segment_of.setdefault(document, ids[at]) == ids[at]
        if token == SEPARATOR and align:
          assert at % align == 0
      else:
        assert row["tokens"][at] == row["targets"][at] == SEPARATOR
    assert len(set(segment_of.values())) == len(segment_of)
  assert next(pairs, None) is None


def test_a_packed_row_by_hand(tmp_path):
  rows = Rows(token_file(tmp_path, [2, 4, 1]), 8, "documents", align=4)
  assert len(rows) == 2
  expected = {
    "tokens": [[0, 1, 2, 0, 0, 3, 4, 5], [6, 0, 0, 0, 0, 7, 0, 0]],
    "targets": [[1, 2, 0, 0, 3, 4, 5, 6], [0, 0, 0, 0, 7, 0, 0, 0]],
    "segment_ids": [[1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 2, 2, 0, 0]],
    "weights": [[1, 1, 1, 0, 1, 1, 1, 1], [1, 0, 0, 0, 1, 1, 0, 0]],
  }
  for key, value in expected.items():
    np.testing.assert_array_equal([rows[0][key], rows[1][key]], value)


def test_a_row_in_the_midst_of_many_documents_is_found_fast(tmp_path):
  rows = Rows(token_file(tmp_path, [3] * 20_000), 64, "documents", align=16)
  start = time.perf_counter()
  for i in range(0, len(rows), 10):
    rows[i]
  assert (time.perf_counter() - start) / (len(rows) / 10) < 2e-3  # seconds


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  rng = np.random.default_rng(0)
  return token_file(tmp_path_factory.mktemp("t"), rng.integers(1, 50, 60))


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def assert_equal(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others):
    assert batch.keys() == other.keys()
    for key in batch:
      np.testing.assert_array_equal(batch[key], other[key], strict=True)


def rows_of(batches):
  return [tuple(row) for batch in batches for row in batch["tokens"].tolist()]


SETTINGS = {"seq_len": 16, "batch_size": 4}


def test_batches_have_the_agreed_shape(file):
  batch = next(data.loader(file, **SETTINGS))
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    "tokens": ((4, 16), "int32"),
    "targets": ((4, 16), "int32"),
    "segment_ids": ((4, 16), "int32"),
    "weights": ((4, 16), "float32"),
  }


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_each_epoch_is_another_order_of_all_rows(file, batch_size):
  rows = Rows(file, 16, "documents")
  everything = sorted(tuple(rows[i]["tokens"].tolist()) for i in range(len(rows)))
  iterator = data.loader(file, seq_len=16, batch_size=batch_size)
  got = rows_of(take(iterator, -(-3 * len(rows) // batch_size)))
  epochs = [got[i * len(rows) : (i + 1) * len(rows)] for i in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == everything
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_seed_decides_the_order(file):
  runs = [rows_of(take(data.loader(file, seed=s, **SETTINGS), 40)) for s in (0, 0, 1, -1)]
  assert runs[0] == runs[1]
  assert len({tuple(run) for run in runs}) == 3
  # Not even another seed's later epoch.
  count = len(Rows(file, 16, "documents"))
  assert runs[0][count : 2 * count] != runs[2][:count]


def test_without_shuffling_rows_come_in_order(file):
  rows = Rows(file, 16, "documents")
  got = rows_of(take(data.loader(file, shuffle=False, **SETTINGS), 3))
  assert got == [tuple(rows[i]["tokens"].tolist()) for i in range(12)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_single_row_repeats(tmp_path, packing):
  got = take(data.loader(token_file(tmp_path, [3]), packing=packing, **SETTINGS), 2)
  assert set(rows_of(got)) == {(0, 1, 2, 3) + (0,) * 12}


def test_state_is_the_step_and_resumes_exactly_through_json(file):
  batches = take(data.loader(file, seed=3, **SETTINGS), 40)
  for step in range(0, 36, 5):
    iterator = data.loader(file, seed=3, **SETTINGS)
    take(iterator, step)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"next_index": step}
    resumed = data.loader(file, seed=3, **SETTINGS)
    take(resumed, 2)  # a used iterator is set back as well as a new one
    resumed.set_state(state)
    assert_equal(take(resumed, 4), batches[step : step + 4])
    assert resumed.get_state() == {"next_index": step + 4}
    assert_equal(take(data.loader(file, seed=3, start=step, **SETTINGS), 4), batches[step:][:4])


@pytest.mark.parametrize("count", [2, 4, 8])
def test_order_does_not_depend_on_the_number_of_processes(file, count):
  settings = {"seq_len": 16, "seed": 5, "align": 4}
  one = data.loader(file, batch_size=8, **settings)
  before = take(one, 7)
  state = one.get_state()
  after = take(one, 20)
  many = [
    data.loader(file, batch_size=8 // count, process_index=p, process_count=count, **settings)
    for p in range(count)
  ]

  def together(steps):
    return [
      {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
      for parts in zip(*(take(process, steps) for process in many))
    ]

  assert_equal(together(7), before)
  assert [process.get_state() for process in many] == [state] * count
  take(many[0], 3)
  for process in many:
    process.set_state(state)
  assert_equal(together(20), after)
  # And back on one process.
  one.set_state(many[0].get_state())
  assert one.get_state() == {"next_index": 27}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_one_epoch_drops_nothing_and_ends_together(file, shuffle, count, batch_size):
  rows = Rows(file, 16, "documents")
  kwargs = {"seq_len": 16, "batch_size": batch_size, "shuffle": shuffle, "repeat": False}
  parts = [
    list(data.loader(file, process_index=p, process_count=count, **kwargs)) for p in range(count)
  ]
  assert {len(part) for part in parts} == {-(-len(rows) // (batch_size * count))}
  batches = [batch for step in zip(*parts) for batch in step]
  assert {batch["tokens"].shape for batch in batches} == {(batch_size, 16)}
  ids = np.concatenate([batch["segment_ids"] for batch in batches])
  weights = np.concatenate([batch["weights"] for batch in batches])
  assert weights.sum() == file.num_tokens - 1
  assert ids[: len(rows)].any(1).all()
  assert not ids[len(rows) :].any() and not weights[len(rows) :].any()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"seq_len": 0}, "seq_len=0; accepted is at least 1"),
    ({"batch_size": 0}, "batch_size=0 rows per process; accepted is at least 1"),
    ({"packing": "best"}, "data.packing='best'; accepted are documents, concat"),
    ({"align": 5}, "data.align=5 must be 0 or divide seq_len=16"),
    ({"align": -4}, "data.align=-4 must be 0 or divide seq_len=16"),
    (
      {"align": 4, "packing": "concat"},
      "data.align=4 needs data.packing='documents', given 'concat'",
    ),
    (
      {"process_index": 2, "process_count": 2},
      r"process_index=2 must be in \[0, process_count=2\)",
    ),
  ],
)
def test_bad_arguments_are_one_sentence(file, change, message):
  with pytest.raises(UserError, match=message):
    data.loader(file, **(SETTINGS | change))


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

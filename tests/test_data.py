"""Packing, loading, resuming and preparing: every token a target once, every state exact."""

import itertools
import json
import pathlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import data
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

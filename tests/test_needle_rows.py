"""Needles to train on: what a row holds, how samples grow, the tokens that they are made of."""

import re

import jax
import numpy as np
import pytest

from experiments import config, data, needles, tasks, tokenise
from experiments.errors import UserError
from experiments.tasks import niah

jax.config.update("jax_numpy_rank_promotion", "raise")

BYTES = tokenise.ByteTokenizer()
STORY = """
  The fox went out. Was it cold? It was not, said the owl! They walked for an hour, and then they
  came to the river. Nobody was there. A crow sang.
"""
KNOBS = {
  "kinds": "niah_single_1, niah_single_3",
  "haystack": "",
  "words": "",
  "tokenizer": "byte",
  "min_length": 100,
  "answer_only": True,
  "grow_examples": 0,
  "train_examples": 50,
  "held_out_examples": 10,
  "seed": 0,
}


def _segments(row):
  """(tokens, targets, weights) of each of a row's samples."""
  ids = row["segment_ids"]
  for number in range(1, ids.max() + 1):
    yield tuple(row[name][ids == number] for name in ("tokens", "targets", "weights"))


@pytest.mark.parametrize("answer_only", [True, False])
def test_rows_teach_the_answers(tmp_path, answer_only):
  (tmp_path / "story.txt").write_text(STORY)
  knobs = niah.Config(**KNOBS | {"haystack": str(tmp_path), "answer_only": answer_only})
  rows = niah.Rows(knobs, "train", 1200)
  assert (len(rows), len(niah.Rows(knobs, "test", 1200)), knobs.vocab_size) == (50, 10, 257)
  first, sizes, begins, said = [], [], set(), set()
  for i in range(50):
    row = rows[i]
    used = int((row["segment_ids"] > 0).sum())
    assert used > 900 and not row["weights"][used:].any()
    for j, (tokens, targets, weights) in enumerate(_segments(row)):
      np.testing.assert_array_equal(tokens[1:], targets[:-1])
      assert tokens[0] == targets[-1] == BYTES.eos_id
      text = BYTES.decode(tokens.tolist())
      assert ("uuid" in text) == ((i + j) % 2 == 1)
      head, answer = text.rsplit("provided text is", 1)
      assert re.search(rf"is: {re.escape(answer.strip())}", head)  # the needle's own words
      assert BYTES.decode(targets[weights > 0].tolist()) == (answer if answer_only else text)
      assert answer not in said
      said.add(answer)
      sizes.append(len(tokens))
      first += [len(tokens)] if j == 0 else []
      if "uuid" in text and "quiz" in text:
        begins.add(text.split("\n")[1].split()[0])
  assert min(first) < 200 and 1000 < max(first) <= 1200 and 300 < np.median(first) < 700
  assert min(sizes) < 170 and np.median(sizes) < 400 and len(sizes) > 100
  assert len(begins) > 5


def test_a_row_shorter_than_the_shortest_samples_holds_one():
  rows = niah.Rows(
    niah.Config(**KNOBS | {"kinds": "niah_single_1", "min_length": 600}), "test", 500
  )
  (sample,) = _segments(rows[0])
  assert 380 < len(sample[0]) <= 500


def test_samples_grow_and_kinds_join_from_row_to_row(tmp_path):
  (tmp_path / "story.txt").write_text(STORY)
  kinds = "niah_single_1, niah_single_2"
  knobs = dict(kinds=kinds, haystack=str(tmp_path), min_length=32, grow_examples=40)
  config = niah.Config(**KNOBS | knobs)
  rows = niah.Rows(config, "train", 1200)
  samples = [[t for t, *_ in _segments(rows[i])] for i in range(50)]
  longest = [max(map(len, row)) for row in samples]
  # A bare needle has about 150 bytes, whatever is asked for.
  assert max(longest[:10]) < 180 and max(longest[:25]) < 400 and max(longest[40:]) > 900
  assert [rows.longest(i) for i in (0, 20, 40, 49)] == [32, 79, 1200, 1200]  # 32^.75 1200^.25
  numbers = [len(rows.generators_of(i)) for i in range(50)]
  assert numbers == [1] * 20 + [2] * 30
  held_out = niah.Rows(config, "validation", 1200)
  assert held_out.longest(0) == 1200 and len(held_out.generators_of(0)) == 2
  assert rows.in_order and not held_out.in_order


def test_a_bpe_of_samples_has_numbers_of_few_tokens(tmp_path):
  (tmp_path / "story.txt").write_text(STORY)
  knobs = KNOBS | {"haystack": str(tmp_path), "tokenizer": "bpe-700", "grow_examples": 40}
  bpe = niah.Config(**knobs).loaded
  assert (bpe.name, bpe.vocab_size) == ("bpe-700", 700)
  assert niah.Config(**knobs).loaded is bpe  # trained once
  numbers = [len(bpe.encode(f" {n}")) for n in range(4_000_000, 4_900_000, 30_011)]
  assert np.mean(numbers) < 6  # of 7 digits
  for text in ("One of the special magic numbers", needles.LINE, "größe\n"):
    assert bpe.decode(bpe.encode(text)) == text
  row = niah.Rows(niah.Config(**knobs), "test", 600)[0]
  assert " mentioned in the provided text is" in bpe.decode(row["tokens"].tolist())
  # A checkpoint is of its tokens, which other samples would not have.
  identity = lambda **more: tasks.TaskDataset("niah", niah.Config(**knobs | more)).identity
  assert identity() == {"corpus": "niah", "tokenizer": tokenise.digest(bpe)}
  assert identity(kinds="niah_single_1") != identity()


def test_rows_that_grow_are_not_shuffled():
  def first(grow):
    config = niah.Config(**KNOBS | {"kinds": "niah_single_1", "grow_examples": grow})
    split = tasks.Split("niah", config, "train")
    batches = data.loader(split, seq_len=1200, batch_size=2)
    rows = split.rows(1200)
    return [[batch["tokens"].tolist() for _, batch in zip(range(2), batches)]] + [
      [[rows[2 * step + i]["tokens"].tolist() for i in range(2)] for step in range(2)]
    ]

  loaded, in_order = first(40)
  assert loaded == in_order
  loaded, in_order = first(0)
  assert loaded != in_order


@pytest.mark.parametrize(
  "knobs, seq_len, words",
  [
    ({}, 1200, "niah_single_3 hides its needle in an essay"),
    ({"kinds": "niah_single_1"}, 100, "length=100 is too short for niah_single_1"),
    ({"kinds": "sums"}, 1200, "kind 'sums' is unknown"),
    ({"tokenizer": "bpe-100"}, 1200, "'bpe-100'; accepted is at least 'bpe-257'"),
    ({"tokenizer": "/nowhere.json"}, 1200, "tokenizer '/nowhere.json' does not exist"),
    ({"min_length": 0}, 1200, "data.niah.min_length=0; accepted is at least 1"),
    ({"seed": -1}, 1200, "data.niah.seed=-1; accepted is at least 0"),
    ({"grow_examples": -1}, 1200, "data.niah.grow_examples=-1; accepted is at least 0"),
  ],
)
def test_a_task_that_does_not_fit_is_one_sentence(knobs, seq_len, words):
  with pytest.raises(UserError) as e:
    niah.Rows(niah.Config(**KNOBS | knobs), "train", seq_len)
  assert words in str(e.value) and "\n" not in str(e.value)


def test_a_run_on_the_task_is_a_dataset():
  cfg = config.parse(["", "--config.data.task=niah"])
  dataset = data.load(cfg.data)
  batch = next(data.loader(dataset.train, seq_len=1024, batch_size=2))
  assert isinstance(dataset, tasks.TaskDataset) and batch["weights"].sum() == 2 * 10

"""Overwriting and forgetting as a task: its layout, the last binding, what does not fit."""

import numpy as np
import pytest

from experiments import config, tasks
from experiments.errors import UserError
from experiments.tasks import rebind

KNOBS = dict(
  vocab_size=64,
  pairs=6,
  rebound=3,
  gap=10,
  noise=False,
  train_examples=1000,
  held_out_examples=100,
  seed=0,
)


def _rows(seq_len=48, split="train", **knobs):
  return rebind.Rows(rebind.Config(**KNOBS | knobs), split, seq_len)


@pytest.mark.parametrize(
  "seq_len, knobs",
  [
    (40, {}),
    (48, {"noise": True}),
    (60, {"rebound": 0}),
    (37, {"rebound": 6, "gap": 1}),
    (4, {"pairs": 1, "rebound": 0, "gap": 0, "vocab_size": 4}),
    (32, {"pairs": 5, "rebound": 5, "gap": 0, "vocab_size": 20}),
  ],
)
def test_a_query_wants_what_its_key_was_bound_to_last(seq_len, knobs):
  rows = _rows(seq_len, **knobs)
  c = rows.config
  bound, again = 2 * (c.pairs + c.rebound), set()
  for i in range(50):
    row = rows[i]
    tokens, asked = row["tokens"].tolist(), np.flatnonzero(row["weights"]).tolist()
    keys, values = tokens[0:bound:2], tokens[1:bound:2]
    assert len(set(keys[: c.pairs])) == c.pairs and len(set(values)) == c.pairs + c.rebound
    assert set(keys) <= set(range(1, c.vocab_size // 2))
    assert set(values) <= set(range(c.vocab_size // 2, c.vocab_size))
    assert len(set(keys[c.pairs :])) == c.rebound and set(keys[c.pairs :]) <= set(keys[: c.pairs])
    again |= {keys.index(key) for key in keys[c.pairs :]}
    last = dict(zip(keys, values))  # the later of two entries stays
    assert asked == [bound + c.gap + 2 * j for j in range(c.pairs)]
    assert sorted(tokens[t] for t in asked) == sorted(keys[: c.pairs])
    assert [last[tokens[t]] for t in asked] == row["targets"][asked].tolist()
    assert not np.delete(row["targets"], asked).any() and (row["segment_ids"] == 1).all()
    if not c.noise:
      assert not np.delete(row["tokens"][bound:], np.array(asked) - bound).any()
  assert again == (set(range(c.pairs)) if c.rebound else set())


def test_a_row_depends_on_seed_split_and_number_alone():
  same = _rows(train_examples=7, held_out_examples=9)[3]
  for key, value in _rows()[3].items():
    np.testing.assert_array_equal(same[key], value)
  others = [_rows()[4], _rows(seed=1)[3], _rows(split="validation")[3], _rows(split="test")[3]]
  assert len({row["tokens"].tobytes() for row in [same, *others]}) == 5
  assert [len(_rows(split=s)) for s in ("train", "validation", "test")] == [1000, 100, 100]


@pytest.mark.parametrize(
  "seq_len, knobs, words",
  [
    (39, {}, "seq_len=39 is too short for data.rebind; accepted is at least 40"),
    (64, {"rebound": 7}, "data.rebind.rebound=7; accepted is from 0 to data.rebind.pairs=6"),
    (64, {"rebound": -1}, "data.rebind.rebound=-1; accepted is from 0"),
    (64, {"pairs": 0}, "data.rebind.pairs=0; accepted is at least 1"),
    (64, {"gap": -1}, "data.rebind.gap=-1; accepted is at least 0"),
    (64, {"vocab_size": 17}, "vocab_size=17 is too small for 6 keys and 9 values; accepted is at"),
    (64, {"train_examples": 0}, "data.rebind.train_examples=0; accepted is at least 1"),
  ],
)
def test_what_does_not_fit_is_one_sentence(seq_len, knobs, words):
  with pytest.raises(UserError) as e:
    _rows(seq_len, **knobs)
  assert words in str(e.value) and "\n" not in str(e.value)


def test_the_default_config_has_its_knobs():
  dataset = tasks.load(config.parse(["", "--config.data.task=rebind"]).data)
  assert dataset.vocab_size == 64 and len(dataset.train.rows(64)) == 100_000

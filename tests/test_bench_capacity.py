"""The benchmark of capacity: few pairs come back, many do not, and nothing is read from nothing."""

import numpy as np

from benchmarks import capacity


def test_a_small_table_has_all_readings_and_few_pairs_come_back():
  lines = list(capacity.table(rows=4, numbers=(2,)))
  assert {line[0] for line in lines} == {"delta rule", *capacity.READINGS}
  assert all(float(line[-1]) >= 0.75 for line in lines)


def test_memories_hold_fewer_of_many_pairs_and_nothing_that_was_not_written():
  few, many = (capacity.pairs(4, n, (16, 16, 16)) for n in (4, 64))
  reading = capacity.Config()
  for share, less in zip(
    capacity.two_passes(reading, few, 0.5), capacity.two_passes(reading, many, 0.5)
  ):
    assert less < 0.8 * share
  assert capacity.delta_rule(many, 0.5) < 0.8 * capacity.delta_rule(few, 0.5)
  # All reads are 0, so the first pair is as near as any.
  np.testing.assert_allclose(capacity.two_passes(reading, many, 0.0), 1 / 64)


def test_a_read_is_right_when_its_own_is_the_nearest():
  stored = np.eye(4, dtype=np.float32)[None]
  read = 3 * stored[:, [0, 1, 3, 2]] + 0.1
  assert capacity.right(read, stored) == 0.5

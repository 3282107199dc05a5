"""The parity benchmark, without its references: what it measures and what it refuses."""

import jax
import numpy as np
import pytest

from benchmarks import parity

jax.config.update("jax_numpy_rank_promotion", "raise")


def test_errors_are_relative_and_the_worst_counts():
  one, other = np.ones(4), np.asarray([1.0, 1.0, 1.0, 1.2])
  assert parity.error((one, other), (one, one)) == pytest.approx(0.1)
  assert np.isnan(parity.error((one * np.nan, one), (one, one)))
  with pytest.raises(ValueError, match=r"shapes differ: \(4,\) here, \(3,\) in the reference"):
    parity.error(one, one[:3])


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([], "there is nothing to compare: give --fla, --ttt or both"),
    (["--fla={}"], "naive.py does not exist; --fla takes a checkout of github.com/fla-org"),
    (["--ttt={}"], "ttt.py does not exist; --ttt takes a checkout of github.com/test-time"),
  ],
)
def test_mistakes_are_one_sentence(flags, message, tmp_path, capsys):
  with pytest.raises(SystemExit) as stop:
    parity.main(["", *(flag.format(tmp_path) for flag in flags)])
  assert stop.value.code == 2 and message in capsys.readouterr().err

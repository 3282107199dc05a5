"""The TPU kernels' static cycle estimates have not become worse than the committed table."""

import pytest

from benchmarks import kernel_tpu, libtpu


def test_the_committed_table_is_whole():
  rows = kernel_tpu.committed()
  assert list(rows) == kernel_tpu.cases()
  for shape in kernel_tpu.SCANNED:
    cycles = lambda what: rows[shape._replace(what=what)]["cycles"]
    assert cycles("xla_forward") >= 8 * cycles("forward")
    assert cycles("xla_both") >= 8 * (cycles("saving") + cycles("backward"))


@pytest.mark.skipif(not libtpu.library(), reason="libtpu is not installed")
@pytest.mark.parametrize(
  "case",
  [
    pytest.param(case, marks=[pytest.mark.slow] if i else [])
    for i, case in enumerate(kernel_tpu.cases())
  ],
)
def test_no_more_than_five_percent_worse(case):
  assert kernel_tpu.worse(case) is None

"""The table of the GPU kernels' registers: whole and, where triton is installed, still true."""

import importlib.util
import json

import pytest

from benchmarks import kernel_gpu

TABLE = [json.loads(line) for line in kernel_gpu.RESULTS.read_text().splitlines()]
NAMES = {
  "trellis_evolve",
  "trellis_read",
  "trellis_read_values_backward",
  "trellis_read_keys_backward",
  "trellis_evolve_backward",
  "trellis_writes_backward",
}
needs_triton = pytest.mark.skipif(
  importlib.util.find_spec("triton") is None,
  reason="triton, which compiles the kernels, is not installed (`pip install triton==3.6.0`)",
)


def _shape(row):
  return kernel_gpu.Shape(*(row[k] for k in kernel_gpu.Shape._fields))


def test_the_table_has_every_kernel_of_every_shape():
  shapes = list(kernel_gpu.shapes())
  assert list(dict.fromkeys(map(_shape, TABLE))) == shapes
  for shape in shapes:
    more = ["trellis_step"] if shape == kernel_gpu.Shape(*shape[:3]) else []
    if shape.linearised:
      more = ["trellis_solvers", "trellis_solvers_backward", "trellis_follow_backward"]
    names = [x["kernel"] for x in TABLE if _shape(x) == shape]
    assert sorted(names) == sorted([*NAMES, *more])


def test_no_kernel_spills():
  for row in TABLE:
    assert row["spill_bytes"] == 0, row
    # What a program may have of a multiprocessor: threads times registers, and shared memory.
    assert row["warps"] * 32 * row["registers"] <= 65536
    assert row["shared_bytes"] <= 227 * 1024


def test_the_page_is_that_of_the_lines():
  text = kernel_gpu.RESULTS.with_suffix(".md").read_text()
  first = TABLE[0]
  versions = f"jax {first['jax']}, triton {first['triton']}, {kernel_gpu.ARCH}"
  assert text == kernel_gpu.report(TABLE, "python -m benchmarks.kernel_gpu", versions)


def test_what_is_worse_than_the_table_is_said():
  row = TABLE[0]
  changes = (dict(registers=row["registers"] * 2), dict(spill_bytes=8), dict(C=48))
  (one,), (two,), (three,) = (kernel_gpu.worse([{**row, **x}], TABLE) for x in changes)
  assert f"registers {2 * row['registers']}, was {row['registers']}" in one
  assert "spill_bytes 8, was 0" in two and "has no row" in three
  assert not kernel_gpu.worse(TABLE, TABLE)


@needs_triton
def test_the_first_shape_is_no_worse_than_the_table():
  assert not kernel_gpu.worse(kernel_gpu.lines([next(kernel_gpu.shapes())]), TABLE)


@needs_triton
@pytest.mark.slow
def test_no_shape_is_worse_than_the_table():
  assert not kernel_gpu.worse(kernel_gpu.lines(list(kernel_gpu.shapes())), TABLE)

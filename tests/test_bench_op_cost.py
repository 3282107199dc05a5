"""The benchmark of the op: what it compares computes the same."""

import jax
import op_cases
import pytest

from benchmarks import op_cost

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.mark.parametrize("side", [op_cost.autodiff, lambda: op_cost.step("reference")])
def test_the_sides_of_a_row_agree(side):
  x = op_cost.inputs(1, 48, 2, 8, 5)
  assert op_cases.distance(side()(x), op_cost.step("xla")(x)) <= 1e-4


def test_the_exact_recurrence_is_another_function():
  x = op_cost.inputs(1, 48, 2, 8, 5)
  assert op_cases.distance(op_cost.step("xla", 1)(x), op_cost.step("xla")(x)) > 1e-3

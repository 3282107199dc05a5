"""The benchmark of a step on a CPU: its sides take the same gradients by different programs."""

import jax
import op_cases
import pytest

from benchmarks import cpu_step
from experiments.configs.paper import base


@pytest.fixture(autouse=True)
def _one_short_row(monkeypatch):
  monkeypatch.setattr(cpu_step, "CONTEXT", 512)
  monkeypatch.setitem(base.BATCH_TOKENS, "mini", 512)


def test_the_sides_take_the_same_gradients_by_the_products_they_name():
  calls = {name: cpu_step.side("trellis_wide", *how) for name, how in cpu_step.SIDES.items()}
  first, *others = (jax.block_until_ready(call()) for call in calls.values())
  for gradients in others:
    assert op_cases.distance(gradients, first) <= 1e-4
  texts = [call.func.as_text() for call in calls.values()]
  assert len(set(texts)) == len(texts)


def test_the_table_has_every_side(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(cpu_step, "RESULTS", tmp_path / "cpu_step.md")
  monkeypatch.setattr(cpu_step, "MODELS", ("trellis_wide",))
  monkeypatch.setattr(cpu_step, "ROUNDS", 1)
  cpu_step.main()
  written = (tmp_path / "cpu_step.md").read_text()
  assert all(name in written for name in cpu_step.SIDES)
  assert written in capsys.readouterr().out

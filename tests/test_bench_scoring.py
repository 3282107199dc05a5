"""The benchmark of reused contexts: small enough for a test, and red when the two ways differ."""

import pytest

from benchmarks import scoring_cost

SMALL = dict(
  contexts=(9,),
  rounds=1,
  vocab_size=32,
  width=16,
  num_layers=1,
  num_heads=1,
  mixer="linear_attention",
)


def test_a_small_run_writes_the_table(tmp_path, capsys):
  path = tmp_path / "table.md"
  scoring_cost.main(path=path, **SMALL)
  assert path.read_text() in capsys.readouterr().out
  cells = path.read_text().splitlines()[-1].split("|")[1:-1]
  tokens = [float(cell.replace(",", "")) for cell in cells[:4]]
  assert tokens == [9, 16 * (10 + 64), 16 * 4 * 26, pytest.approx(1664 / 1184, abs=0.01)]


def test_no_number_is_shown_when_the_two_ways_differ(tmp_path, monkeypatch):
  wrong = scoring_cost.apart
  monkeypatch.setattr(scoring_cost, "apart", lambda *a: [x - 0.1 for x in wrong(*a)])
  with pytest.raises(RuntimeError, match=r"context 9: .* are not the same"):
    scoring_cost.main(path=tmp_path / "table.md", **SMALL)
  assert not list(tmp_path.iterdir())

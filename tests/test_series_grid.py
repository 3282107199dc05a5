"""The grid of series runs resumes and says what was not run; its table can be made again."""

import jax
import pytest
from test_series import FLAGS
from test_series_data import _write

from experiments import metrics
from experiments.series import grid, published, table, train

jax.config.update("jax_numpy_rank_promotion", "raise")

QUICK = [*FLAGS, "--config.model.num_layers=0", "--config.steps=4"]


@pytest.fixture
def folder(tmp_path):
  below = tmp_path / "data" / "below"
  below.mkdir(parents=True)
  for name in ("some", "other"):
    _write(below / f"{name}.csv", rows=300, cell=lambda row, at: (row * 37 + at) % 11)
  return tmp_path / "data"


def test_a_grid_runs_what_is_missing(folder, tmp_path, monkeypatch, capsys):
  results = tmp_path / "results"
  argv = ["grid", str(folder), f"--results={results}", "--datasets=some,other", "--horizons=3,5"]
  argv += ["--models=linear_cycle", *QUICK]
  assert grid.main([*argv, "--seeds=0", "--datasets=some"]) == 0
  lines = metrics.read(results / "some.jsonl")
  assert len(lines) == 2 * (3 + 1) and not (results / "other.jsonl").exists()
  assert grid.main([*argv, "--seeds=0,1"]) == 0
  shown = capsys.readouterr().out
  assert "eta 0:00" in shown and "some 3 linear_cycle seed 1: mse" in shown
  lines = metrics.read(results / "some.jsonl")
  assert len(lines) == 2 * (3 + 2) and len(metrics.read(results / "other.jsonl")) == len(lines)
  assert {(x["labels"]["horizon"], x["seed"]) for x in lines if x["seed"] is not None} == {
    (h, s) for h in (3, 5) for s in (0, 1)
  }
  line = next(x for x in lines if x["seed"] == 1)
  assert "--config.data.path=some.csv" in line["command"] and "--config.seed=1" in line["command"]
  with monkeypatch.context() as patch:
    patch.setattr(train, "run", None)  # would fail if anything were run again
    assert grid.main([*argv, "--seeds=0,1"]) == 0
    assert metrics.read(results / "some.jsonl") == lines
  assert grid.main([*argv, "--seeds=0", "--config.steps=8", "--horizons=3"]) == 0
  after = metrics.read(results / "some.jsonl")
  of = lambda steps: [x for x in after if x["seed"] is not None and x["steps"] == steps]
  assert len(of(8)) == 1 and len(of(4)) == 2  # other settings' lines of this cell are gone
  assert (results / "README.md").read_text() == table.report(table.read(results))


def _lines(model, dataset, horizons, seeds, mse):
  for h in horizons:
    for s in seeds:
      labels = {"dataset": dataset, "horizon": h, "model": model}
      more = dict(parameters=10, revision="abc")
      yield {"labels": labels, "seed": s, "mse": mse + 0.01 * s, "mae": 0.5, **more}


def test_a_grid_runs_dlinear_once_for_each_seed(folder, tmp_path, capsys):
  argv = ["grid", str(folder), f"--results={tmp_path}", "--datasets=some", "--horizons=3"]
  argv += ["--models=dlinear", "--config.lookback=16"]
  assert grid.main([*argv, "--seeds=0,1"]) == 0
  lines = [x for x in metrics.read(tmp_path / "some.jsonl") if x["labels"]["model"] == "dlinear"]
  assert [x["seed"] for x in lines] == [0, 1] and lines[0]["mse"] != lines[1]["mse"]
  assert lines[0]["settings"]["learning_rate"] == 1e-4 and lines[0]["settings"]["lookback"] == 16
  assert lines[1]["command"] == (
    "python -m experiments.series.grid FOLDER --models=dlinear --datasets=some --horizons=3"
    " --seeds=1 --config.lookback=16"
  )
  capsys.readouterr()
  assert grid.main([*argv, "--seeds=0,1"]) == 0 and "eta" not in capsys.readouterr().out
  other = [x | {"labels": x["labels"] | {"dataset": "ETTh1", "horizon": h}} for x in lines for h in
           published.HORIZONS]  # fmt: skip
  (said,) = table.parity([x | {"mse": 0.45, "mae": 0.46} for x in other])
  assert said == "ETTh1: DLinear 0.450 and 0.460 here, 0.456 and 0.452 published: -1.3% and +1.8%."


def test_the_table_has_averages_spreads_and_not_run():
  lines = list(_lines("trellis", "ETTh1", published.HORIZONS, (0, 1, 2), 0.43))
  lines += _lines("trellis", "ETTh2", (96, 192), (0,), 0.3)
  text = table.report(lines)
  row = next(line for line in text.splitlines() if line.startswith("| trellis"))
  cells = [cell.strip() for cell in row.split("|")[2:-1]]
  assert cells == ["0.440 (0.430-0.450)", *["not run"] * 4]
  assert "* ETTh1: trellis 0.440 is below DLinear's average MSE 0.456." in text
  assert "* ETTh2: not run at all horizons; DLinear's average MSE is 0.559." in text
  assert "Mean MSE over ETTh1: trellis 0.4400, iTransformer 0.4543, ratio 0.969." in text
  row = next(line for line in text.splitlines() if line.startswith("| ETTh2") and "| 96" in line)
  assert "0.300" in row and "not run" in row and "0.333 0.387" in row
  worse = table.verdicts(list(_lines("trellis", "ETTh1", published.HORIZONS, (0,), 0.5)))
  assert "NOT below" in worse[0]


def test_a_seed_without_all_horizons_is_in_no_average():
  lines = list(_lines("trellis", "ETTh1", published.HORIZONS, (0,), 0.43))
  lines += _lines("trellis", "ETTh1", (96,), (1,), 0.1)
  assert table.ours(lines, "trellis", "ETTh1") == pytest.approx((0.43, 0.5))


@pytest.mark.parametrize("dataset, mse", [("ETTh1", 0.456), ("ETTh2", 0.559), ("ETTm1", 0.403)])
def test_published_averages(dataset, mse):
  assert published.average("DLinear", dataset)[0] == pytest.approx(mse, abs=6e-4)
  assert published.average("Titans", "exchange_rate") is None
  assert published.by_horizon("DLinear", dataset, 100) is None


def test_the_committed_table_is_that_of_the_committed_lines():
  if table.RESULTS.is_dir():
    assert (table.RESULTS / "README.md").read_text() == table.report(table.read(table.RESULTS))


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--datasets=none"], "holds 0 files none.csv, but it must hold one"),
    (["--datasets=some", "--models=none"], "--models=none is unknown; accepted are abc"),
    (["--datasets=some", "--config.horizonn=1"], "config.horizonn is no field"),
    (["--datasets=some", "--horizons=900"], "horizon=900"),
  ],
)
def test_the_commands_refuse_in_one_sentence(flags, words, folder, tmp_path, capsys):
  assert grid.main(["grid", str(folder), f"--results={tmp_path}", *QUICK, *flags]) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and words in err
  assert table.main(["table", f"--results={tmp_path}"]) == 2
  assert "holds no .jsonl file of results" in capsys.readouterr().err

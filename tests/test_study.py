"""Studies: replicas train as the trainer does, a grid resumes, its table says what was run."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import config, main, metrics, replicas, study
from experiments.errors import UserError

jax.config.update("jax_numpy_rank_promotion", "raise")

CONFIG = str(pathlib.Path(config.DEFAULT).with_name("mqar.py"))
FLAGS = f"""
  --config={CONFIG}:linear --config.steps=6 --config.batch_size=4 --config.model.width=16
  --config.model.mlp_width=16 --config.optim.warmup_steps=2 --config.eval.every=3
  --config.eval.batches=2 --config.log.every=2 --config.model.trellis.num_slots=8
  --config.model.trellis.head_dim=8
""".split()


def _config(*more):
  return config.parse(["", *FLAGS, *more])


def test_a_replica_trains_as_the_trainer_does(tmp_path):
  seeds, rates = (0, 3), (3e-3, 1e-2)
  seen = []
  done = replicas.train(_config(), seeds, rates, lambda n, now: seen.append((n, len(now))))
  assert [(r.seed, r.peak_lr) for r in done] == [(s, r) for s in seeds for r in rates]
  assert seen == [(2, 4), (4, 4), (6, 4)]
  replica = done[3]
  folder = tmp_path / "run"
  flags = ["--config.seed=3", "--config.optim.peak_lr=1e-2", f"--config.workdir={folder}"]
  assert main.main(["main", *FLAGS, *flags]) == 0
  records = {r["step"]: r for r in metrics.read(folder / metrics.JSONL)}
  for i, n in enumerate(replica.steps):
    names = {
      "train_loss": "train/loss",
      "train_accuracy": "train/accuracy",
      "grad_norm": "train/grad_norm",
    }
    for name, recorded in names.items():
      want = records[n][recorded]
      np.testing.assert_allclose(getattr(replica, name)[i], want, rtol=2e-4, err_msg=name)
  assert replica.eval_steps == [3, 6]
  np.testing.assert_allclose(replica.eval_loss[-1], records[6]["eval/loss"], rtol=2e-4)
  np.testing.assert_allclose(replica.eval_accuracy[-1], records[6]["eval/accuracy"], atol=0.01)
  assert np.asarray(replica.traces["write_k"]).shape == (2, 2)  # evaluations, layers
  assert all(np.isfinite(values).all() for values in replica.traces.values())
  assert done[2].train_loss != replica.train_loss and done[1].train_loss != replica.train_loss


def test_replicas_in_turn_are_what_they_are_side_by_side(monkeypatch):
  def f(x, shared, y):
    return {"sum": x["a"] + shared * y}

  args = {"a": jnp.arange(6.0).reshape(3, 2)}, jnp.asarray([2.0, 5.0]), jnp.asarray([1.0, 3.0, 4.0])
  in_turn = replicas._over(f, (0, None, 0))(*args)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  together = replicas._over(f, (0, None, 0))(*args)
  np.testing.assert_array_equal(in_turn["sum"], together["sum"])
  np.testing.assert_array_equal(together["sum"][2], [4 + 2 * 4, 5 + 5 * 4])


def test_a_replica_that_diverges_is_lost_and_the_others_go_on():
  flags = ["--config.optim.clip=0", "--config.optim.warmup_steps=0", "--config.log.every=1"]
  lost, kept = replicas.train(_config(*flags), (0,), (1e30, 1e-3))
  assert lost.lost and lost.steps[-1] == lost.lost < 6
  assert lost.line()["accuracy"] is None
  assert kept.lost is None and kept.steps[-1] == 6 and kept.line()["accuracy"] is not None


class _Study:
  SEEDS, LEARNING_RATES, COLUMNS = (0, 1), (1e-3, 3e-3), ("pairs",)
  pairs = (1, 2)

  @classmethod
  def cells(cls):
    for pairs in cls.pairs:
      yield dict(mixer="trellis", pairs=pairs), _config(f"--config.data.mqar.pairs={pairs}")


_Study.__doc__ = "A study.\n\n    command\n\nTwo settings.\n"


def test_a_grid_runs_what_is_missing_and_its_table_says_what_was_run(tmp_path, monkeypatch):
  console, path = study.rich.console.Console(quiet=True), tmp_path / "grid.jsonl"
  study.run(_Study, {"pairs": "2"}, path, console)
  assert len(metrics.read(path)) == 4
  text = study.report(_Study, "grid", metrics.read(path))
  row = next(line for line in text.splitlines() if line.startswith("| trellis"))
  assert row.split("|")[2].strip() == ".." and "(" in row.split("|")[3]
  study.run(_Study, {}, path, console)
  lines = path.read_text()
  assert len(metrics.read(path)) == 8
  assert {line["labels"]["pairs"] for line in metrics.read(path)} == {1, 2}
  monkeypatch.setattr(replicas, "train", None)  # would fail if anything were run again
  study.run(_Study, {}, path, console)
  assert path.read_text() == lines
  with pytest.raises(UserError, match="fits no setting"):
    study.run(_Study, {"pairs": "9"}, path, console)


def test_lines_that_another_process_adds_meanwhile_are_kept(tmp_path, monkeypatch):
  console, path = study.rich.console.Console(quiet=True), tmp_path / "grid.jsonl"

  def train(cfg, seeds, peak_lrs, on_log):
    if cfg.data.mqar.pairs == 1:  # the other process ends in the midst of this one's first setting
      study.run(_Study, {"pairs": "2"}, path, console)
    return [replicas.Replica(s, lr, eval_accuracy=[1.0]) for s in seeds for lr in peak_lrs]

  monkeypatch.setattr(replicas, "train", train)
  study.run(_Study, {"pairs": "1"}, path, console)
  assert [line["labels"]["pairs"] for line in metrics.read(path)] == [2] * 4 + [1] * 4


def test_the_table_shows_the_best_rate_and_counts_a_lost_replica_as_zero():
  line = lambda lr, accuracy, onset: dict(peak_lr=lr, accuracy=accuracy, onset=onset)
  lines = [line(1e-3, 0.6, 300), line(1e-3, 0.8, 100), line(1e-2, 0.9, 50), line(1e-2, None, None)]
  assert study.cell(lines) == "0.70 (0.60-0.80) 300"
  assert study.cell(lines[2:]) == "0.45 (0.00-0.90) -"
  assert study.cell([]) == ".."


def test_every_study_of_the_folder_has_a_grid_of_checked_configs():
  names = [p.stem for p in study.FOLDER.glob("*.py") if not p.stem.startswith("_")]
  for name in names:
    module = study.get(name)
    cells = list(module.cells())
    labels = [json.dumps(labels) for labels, _ in cells]
    assert len(set(labels)) == len(labels) and set(module.COLUMNS) <= set(cells[0][0])
    for _, cfg in cells:
      config.check(cfg)
      assert study.state_floats(cfg) > 0


@pytest.mark.parametrize(
  "argv, words",
  [
    (["sums"], "study 'sums' is unknown; accepted are .*mqar_mixers"),
    (["mqar_mixers", "--only=gla"], "--only=gla is given; accepted is LABEL=VALUE"),
    (["mqar_mixers", "--only=mixer=none"], "fits no setting of the study"),
  ],
)
def test_the_command_refuses_in_one_sentence(argv, words, tmp_path, capsys):
  assert study.main(["study", *argv, f"--results={tmp_path}"]) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1
  assert re.search(words, err)
  assert not list(tmp_path.iterdir())

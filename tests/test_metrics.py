"""Records on disk and on the console: what is written, what a resumed run drops, what it costs."""

import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from experiments import console, metrics, writers
from experiments.configs import default
from experiments.errors import UserError

jax.config.update("jax_numpy_rank_promotion", "raise")


def _write(path, steps, tail=""):
  path.write_text(
    "".join(json.dumps({"step": n, "train/loss": 1 / n}) + "\n" for n in steps) + tail
  )


@pytest.mark.parametrize("tail", ["", '{"step": 6, "tr', '{"step": 6, "train/loss": 0.5}'])
def test_a_resumed_run_drops_later_records_and_a_line_that_was_cut(tmp_path, tail):
  path = tmp_path / metrics.JSONL
  _write(path, range(1, 6), tail)
  assert [r["step"] for r in metrics.read(path)] == [1, 2, 3, 4, 5]
  metrics.truncate(path, 3)
  assert [r["step"] for r in metrics.read(path)] == [1, 2, 3]
  assert [p.name for p in tmp_path.iterdir()] == [metrics.JSONL]
  metrics.truncate(path, 0)
  assert path.read_text() == ""


def test_records_keep_their_exact_values(tmp_path):
  path = tmp_path / metrics.JSONL
  value = float(jnp.float32(0.1) / 3)
  writer = metrics.JsonlWriter(path)
  writer.write({"step": 1, "train/loss": value})
  assert metrics.read(path)[0]["train/loss"] == value  # before it is closed, too
  metrics.truncate(path, 1)
  assert metrics.read(path)[0]["train/loss"] == value
  writer.close()


class _Memory:
  """A writer that keeps its records."""

  def __init__(self):
    self.records, self.closed = [], False

  def write(self, record):
    self.records.append(dict(record))

  def close(self):
    self.closed = True


def _log(every=2, steps=7, on_step=lambda record: None):
  memory = _Memory()
  return memory, metrics.Log([memory], metrics.Throughput(10, 100, None), every, steps, on_step)


def test_the_log_writes_due_steps_evaluations_and_the_last_step():
  seen = []
  memory, log = _log(on_step=lambda record: seen.append(record["step"]))
  with log:
    for n in range(1, 8):
      record = log.read(n, {"loss": jnp.float32(n)})
      log.write(record | ({"eval/loss": 1.0} if n == 3 else {}))
  assert [r["step"] for r in memory.records] == [2, 3, 4, 6, 7]
  assert seen == [1, 2, 3, 4, 5, 6, 7]
  assert memory.records[0]["train/loss"] == 2.0
  assert memory.closed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_stops_and_names_its_step(bad):
  memory, log = _log(every=1)
  with pytest.raises(metrics.NotFiniteError, match=r"grad_norm is .* at step 5"):
    log.read(5, {"loss": jnp.float32(1), "grad_norm": jnp.float32(bad)})
  assert not memory.records


def test_throughput_counts_steps_without_the_first_and_without_what_is_no_step(monkeypatch):
  clock = iter([0.0, 2.0, 4.0, 100.0, 103.0])
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
  throughput = metrics.Throughput(tokens_per_step=10, flops_per_step=600, peak=1000.0)
  throughput.tick()  # at 0: compiled
  assert throughput.report() == {}
  throughput.tick()  # at 2
  throughput.tick()  # at 4
  throughput.skip()  # an evaluation until 100
  throughput.tick()  # at 103
  report = throughput.report()
  assert report["time/step_seconds"] == pytest.approx(7 / 3)
  assert report["time/tokens_per_second"] == pytest.approx(30 / 7)
  assert report["time/model_flops_per_second"] == pytest.approx(1800 / 7)
  assert report["time/mfu"] == pytest.approx(1.8 / 7)
  assert all(name.startswith("time/") for name in report)
  assert throughput.report() == {}


@pytest.mark.parametrize(
  "kinds, peak",
  [
    (["NVIDIA H200"], 989e12),
    (["NVIDIA H100 80GB HBM3"] * 2, 2 * 989e12),
    (["NVIDIA H100 PCIe"], 756e12),
    (["NVIDIA A100-SXM4-80GB"], 312e12),
    (["TPU v5 lite"], 197e12),
    (["TPU v5"], 459e12),
    (["cpu"], None),
    (["NVIDIA H200", "cpu"], None),
  ],
)
def test_peak_of_known_devices(kinds, peak):
  devices = [types.SimpleNamespace(device_kind=kind) for kind in kinds]
  assert metrics.peak_flops(devices) == peak


def _config(**log):
  cfg = default.get_config()
  cfg.log.update(log)
  return cfg


def test_tensorboard_events_are_written_and_optional(tmp_path):
  with metrics.Log(
    writers.open_all(tmp_path, _config(), 0), metrics.Throughput(1, 1, None), 1, 1
  ) as log:
    log.write({"step": 1, "train/loss": 2.5})
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"train/loss" in events.read_bytes()
  assert len(writers.open_all(tmp_path, _config(tensorboard=False), 0)) == 1


def test_wandb_is_asked_for_by_name_and_resumes_its_run(tmp_path, monkeypatch):
  calls = []
  run = types.SimpleNamespace(log=lambda *a, **k: calls.append((a, k)), finish=lambda: None)
  inits = []
  fake = types.SimpleNamespace(init=lambda **k: inits.append(k) or run)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  cfg = _config(tensorboard=False, wandb="project")
  for start in (0, 1):
    writer = writers.open_all(tmp_path, cfg, start)[-1]
    writer.write({"step": start + 1, "train/loss": 2.5})
  assert calls[1] == (({"train/loss": 2.5},), {"step": 2})
  assert inits[0]["project"] == "project" and inits[0]["id"] == inits[1]["id"]


def test_a_missing_wandb_is_one_sentence(monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  writers.check(_config().log)
  with pytest.raises(UserError, match="needs the package wandb"):
    writers.check(_config(wandb="project").log)


RECORD = {
  "step": 5, "train/loss": 3.14159, "eval/loss": 2.5, "eval/perplexity": 12.18,
  "eval/accuracy": 0.25, "eval/bits_per_byte": 2.25, "time/step_seconds": 1.5,
  "time/tokens_per_second": 12345.0,
  "time/model_flops_per_second": 2.5e12, "time/mfu": 0.4375,
}  # fmt: skip


def test_the_console_prints_plain_lines_where_there_is_no_terminal(capsys):
  shown = console.Console(start=0, total=3605)
  shown.write({"step": 4, "train/loss": 3.5})
  shown.write(RECORD)
  shown.close()
  first, second = capsys.readouterr().out.splitlines()
  assert first == "step 4/3605  loss 3.5000"
  for part in (
    "step 5/3605",
    "loss 3.1416",
    "held-out loss 2.5000 ppl 12.18",
    "accuracy 0.25",
    "2.2500 bits/byte",
  ):
    assert part in second
  for part in ("12.3 ktok/s", "2.5 TFLOP/s", "MFU 43.8%", "eta 1:30:00"):
    assert part in second


def test_the_console_shows_a_progress_bar_on_a_terminal(capsys, monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")
  monkeypatch.setenv("COLUMNS", "160")
  shown = console.Console(start=0, total=10)
  assert shown.progress is not None
  task = shown.progress.tasks[0]
  shown.advance(RECORD)
  shown.write(RECORD)
  assert (task.completed, task.total) == (5, 10)
  shown.advance({"step": 6, "train/loss": 1.25})  # is not due, and keeps the latest speed
  assert task.completed == 6
  assert "loss 1.2500" in task.fields["text"] and "12.3 ktok/s" in task.fields["text"]
  shown.close()
  assert "held-out loss 2.5000" in capsys.readouterr().out


@pytest.mark.parametrize(
  "value, text",
  [(0, "0 "), (999, "999 "), (999.7, "1 k"), (12345, "12.3 k"), (3e15, "3 P"), (2e21, "2e+06 P")],
)
def test_si_prefixes(value, text):
  assert console.si(value) == text

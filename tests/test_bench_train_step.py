"""The training step's benchmark: a run on a CPU, and what is read out of a device's profile."""

import json
import types

from benchmarks import device_time, train_step


def test_a_small_run_writes_both_files(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(train_step.SIZES, "small", ("mini", 1, 64))
  monkeypatch.setattr(train_step, "ROUNDS", 1)
  results = tmp_path / "step.jsonl"
  train_step.main(["", "--size=small", "--only=stale chunks of 64", f"--results={results}"])
  (line,) = [json.loads(line) for line in results.read_text().splitlines()]
  assert line["row"] == "trellis, stale chunks of 64" and line["T"] == 64
  assert line["step_seconds"] > 0 and "op_seconds" not in line  # a CPU has no kernels of its own
  text = results.with_suffix(".md").read_text()
  assert text in capsys.readouterr().out and "0.6M" in text and "not run" in text


def test_a_report_says_the_op_s_share_of_the_kernels():
  line = {"row": "a", "size": "125m", "B": 8, "T": 2048, "parameters": 117e6, "step_seconds": 0.1}
  line |= {"tokens_per_second": 163840.0, "device_seconds": 0.08, "op_seconds": 0.02}
  text = train_step.report([line], "command", "machine")
  assert "| 117.0M" in text and "| 100.0" in text and "| 20.0" in text and "| 25%" in text


def test_kernels_are_summed_over_the_lines_of_devices_alone():
  event = lambda name, us: types.SimpleNamespace(name=name, duration_ns=1e3 * us)
  line = lambda name, *events: types.SimpleNamespace(name=name, events=events)
  plane = lambda name, *lines: types.SimpleNamespace(name=name, lines=lines)
  planes = [
    plane("/host:CPU", line("python", event("a", 100))),
    plane(
      "/device:GPU:0",
      line("Stream #14(Compute)", event("a", 2), event("b", 3), event("a", 2)),
      line("XLA Modules", event("whole", 50)),
    ),
    plane("/device:TPU:0", line("XLA Ops", event("b", 1)), line("Steps", event("0", 9))),
  ]
  assert device_time._kernels(planes) == {"a": 4e-6, "b": 4e-6}

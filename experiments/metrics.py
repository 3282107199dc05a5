"""The metrics of a run: read late, timed, checked, and kept as one JSON line per logged step.

A record is flat: `{"step": 7, "train/loss": 5.1, ..., "eval/loss": 5.2, ..., "time/...": ...}`.
Only the fields under `time/` depend on the machine's clock; a run that was killed and resumed
repeats all others bit by bit.
"""

import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import jax

JSONL = "metrics.jsonl"

# Dense bf16 FLOP/s of one device by what JAX calls it, from the vendors' data sheets; the first
# name that the device's kind contains counts.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "B200": 2250e12,
  "H200": 989e12,
  "H100 PCIe": 756e12,
  "H100": 989e12,
  "A100": 312e12,
  "L40S": 362e12,
  "V100": 125e12,
}


def peak_flops(devices: list[jax.Device]) -> float | None:
  """bf16 FLOP/s of all devices together, None where a device's peak is not known."""
  known = [next((v for k, v in PEAK_FLOPS.items() if k in d.device_kind), None) for d in devices]
  return None if None in known else sum(known)


class Throughput:
  """Speed of the steps since the last report, without compilation, evaluation and checkpoints."""

  def __init__(self, tokens_per_step: int, flops_per_step: int, peak: float | None):
    self.tokens, self.flops, self.peak = tokens_per_step, flops_per_step, peak
    self.mark = None
    self.steps, self.seconds = 0, 0.0

  def tick(self) -> None:
    """A step has ended. The first one only starts the clock: it has compiled."""
    now = time.perf_counter()
    if self.mark is not None:
      self.steps += 1
      self.seconds += now - self.mark
    self.mark = now

  def skip(self) -> None:
    """What happened since the last step's end was no training."""
    self.mark = time.perf_counter()

  def report(self) -> dict[str, float]:
    """The `time/` fields of a record, empty before the second step; starts a new count."""
    if not self.steps:
      return {}
    rate = self.steps / self.seconds
    self.steps, self.seconds = 0, 0.0
    fields = {
      "time/step_seconds": 1.0 / rate,
      "time/tokens_per_second": self.tokens * rate,
      "time/model_flops_per_second": self.flops * rate,
    }
    return fields | ({"time/mfu": self.flops * rate / self.peak} if self.peak else {})


class NotFiniteError(FloatingPointError):
  """Training has made a number that is not finite."""


class Writer(Protocol):
  """Takes the records of a run in the order of their steps."""

  def write(self, record: Mapping[str, float]) -> None: ...
  def close(self) -> None: ...


class Log:
  """Reads the metrics of every step, and writes those of each `every`-th and of the last one."""

  def __init__(
    self,
    writers: list[Writer],
    throughput: Throughput,
    every: int,
    steps: int,
    on_step: Callable[[dict[str, float]], None] = lambda record: None,
  ):
    """Args:
    writers: take the records of the steps that are due.
    every, steps: the steps that are due are multiples of the one, and the other.
    on_step: takes the record of every step.
    """
    self.writers, self.throughput, self.on_step = writers, throughput, on_step
    self.every, self.steps = every, steps

  def read(self, step: int, values: Mapping[str, jax.Array]) -> dict[str, float]:
    """Waits for a step's metrics; raises NotFiniteError when one of them is NaN or infinite."""
    values = {name: float(value) for name, value in jax.device_get(values).items()}
    self.throughput.tick()
    for name, value in values.items():
      if not math.isfinite(value):
        raise NotFiniteError(f"{name} is {value} at step {step}")
    return {"step": step} | {f"train/{name}": value for name, value in values.items()}

  def write(self, record: dict[str, float]) -> None:
    """Writes a record if its step is due, or if there is an evaluation in it."""
    step = record["step"]
    due = step % self.every == 0 or step == self.steps or "eval/loss" in record
    record = record | (self.throughput.report() if due else {})
    self.on_step(record)
    for writer in self.writers if due else ():
      writer.write(record)

  def __enter__(self) -> "Log":
    return self

  def __exit__(self, *_) -> None:
    for writer in self.writers:
      writer.close()


class JsonlWriter:
  """Appends one JSON line per record; a line is in the system's hands when `write` returns."""

  def __init__(self, path: pathlib.Path):
    self.file = path.open("a", buffering=1)

  def write(self, record: Mapping[str, float]) -> None:
    self.file.write(json.dumps(record) + "\n")

  def close(self) -> None:
    self.file.close()


def read(path: pathlib.Path) -> list[dict[str, float]]:
  """The whole records of a metrics file; a last line that a kill has cut is left out."""
  records = []
  for line in path.read_text().splitlines(keepends=True):
    if not line.endswith("\n"):
      break
    records.append(json.loads(line))
  return records


def truncate(path: pathlib.Path, step: int) -> None:
  """Drops the records after `step`, and a last line that was cut, so that a run can go on there."""
  if not path.exists():
    return
  kept = [record for record in read(path) if record["step"] <= step]
  partial = path.with_suffix(".partial")
  partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
  os.replace(partial, path)

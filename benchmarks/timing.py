"""What the benchmarks of mixers share: sides that take turns, results that are whole or absent."""

import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent


def turns(sides: Mapping[Any, Callable[[], Any]], rounds: int, slow: float) -> dict[Any, float]:
  """Median seconds of each side, the sides taking turns, so that a pause hits them alike.

  Args:
    sides: name -> call, compiled.
    rounds: calls of each, after one that does not count.
    slow: seconds from which on that one is the side's only call.
  """
  times = {name: [_seconds(call)] for name, call in sides.items()}
  for _ in range(rounds):
    for name, call in sides.items():
      if times[name][0] < slow:
        times[name].append(_seconds(call))
  return {name: float(np.median(t[1:] or t)) for name, t in times.items()}


def _seconds(call: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def machine() -> str:
  """What the numbers depend on: the machine, its devices and jax, in a line."""
  device = jax.devices()[0]
  kind = device.device_kind if device.platform != "cpu" else f"CPU, {os.cpu_count()} cores"
  return f"{platform.machine()}, {kind}, jax {jax.__version__}"


def revision(*folders: str, root: pathlib.Path = ROOT) -> str:
  """The commit of a checkout, with "+changes" when the folders differ from it, or "unknown"."""

  def git(*args):
    done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if not done.returncode else ""

  if not (root / ".git").exists():  # a copy inside of another checkout
    return "unknown"
  return git("rev-parse", "--short", "HEAD") + "+changes" * bool(
    git("status", "--porcelain", "--", *folders)
  )


def write(path: pathlib.Path, text: str) -> None:
  """Writes a file at once, so that whoever stops the benchmark finds the old one or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f"{path.name}.partial")
  partial.write_text(text)
  os.replace(partial, path)

"""What the benchmarks share: sides that take turns."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def turns(
  sides: Mapping[Any, Callable[[], Any]], rounds: int, slow: float = float("inf")
) -> dict[Any, float]:
  """Median seconds of each side, the sides taking turns, so that a pause hits them alike.

  A turn is two calls and the second one counts: the first pays for the memory that the side before
  gave back to the system.

  Args:
    sides: name -> call, compiled.
    rounds: turns of each, after a call that does not count.
    slow: seconds from which on that one is the side's only call.
  """
  times = {name: [_seconds(call)] for name, call in sides.items()}
  for _ in range(rounds):
    for name, call in sides.items():
      if times[name][0] < slow:
        _seconds(call)
        times[name].append(_seconds(call))
  return {name: float(np.median(t[1:] or t)) for name, t in times.items()}


def _seconds(call: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start

"""What a GPU or TPU itself spends on calls, by kernel, out of JAX's profiler.

The clock of the host also counts what dispatching costs it, which differs between frameworks and
hides behind longer work; sums of kernels' own times do not.
"""

import collections
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax


def by_kernel(call: Callable[[], Any], times: int) -> dict[str, float]:
  """Returns name -> device seconds a call, of everything that `times` calls launched.

  Empty where the profiler sees no device, as on a CPU.

  Args:
    call: compiled, called before; what it returns is waited for.
    times: calls that are profiled.
  """
  quiet = jax.profiler.ProfileOptions()
  quiet.host_tracer_level = quiet.python_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=quiet):
      for _ in range(times):
        jax.block_until_ready(call())
    # With nothing of the host there may be nothing at all.
    path = next(pathlib.Path(folder).rglob("*.xplane.pb"), None)
    if path is None:
      return {}
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    return {name: total / times for name, total in _kernels(planes).items()}


def _kernels(planes: Iterable) -> dict[str, float]:
  """Returns name -> seconds of the events on the devices' own lines of a profile."""
  total = collections.Counter()
  for plane in planes:
    if not plane.name.startswith(("/device:GPU", "/device:TPU")):
      continue
    for line in plane.lines:
      # A GPU has a line a stream, a TPU one of its programs' operations; others repeat these.
      if line.name.startswith("Stream") or line.name == "XLA Ops":
        for event in line.events:
          total[event.name] += event.duration_ns / 1e9
  return dict(total)

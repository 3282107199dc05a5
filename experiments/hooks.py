"""What may come to a run from outside: a request to stop, a wish for a profile, a second run."""

import contextlib
import fcntl
import pathlib
import signal
from collections.abc import Iterator

import jax
import ml_collections
from jax.experimental import multihost_utils

from experiments.errors import UserError


class StopRequest:
  """Remembers a SIGTERM or Ctrl-C until the step in progress has ended; a second one ends at once.

  With several processes JAX's own handler of SIGTERM takes its place, which makes all of them stop
  after the same step.
  """

  def __init__(self):
    self.name = ""  # of the signal that came
    self.handlers = {}

  def requested(self, step: int) -> bool:
    """Whether to stop after this step; all processes must ask, and get the same answer."""
    if jax.process_count() > 1:
      self.name = "SIGTERM"
      return multihost_utils.reached_preemption_sync_point(step)
    return bool(self.name)

  def __enter__(self) -> "StopRequest":
    signals = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    self.handlers = {s: signal.signal(s, self._remember) for s in signals}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self.handlers.items():
      signal.signal(number, handler)

  def _remember(self, number: int, _) -> None:
    self.name = signal.Signals(number).name
    self.__exit__()


class Profiler:
  """Traces steps `start` to `start + steps - 1` with jax.profiler into `workdir/profile`."""

  def __init__(self, workdir: pathlib.Path, cfg: ml_collections.ConfigDict):
    self.folder = workdir / "profile"
    self.start, self.end = cfg.start, cfg.start + cfg.steps
    self.tracing = False

  def before(self, step: int, running: jax.typing.ArrayLike) -> None:
    """Starts or stops the trace before `step`; waits for `running`, the step before it."""
    if self.start >= 1 and step in (self.start, self.end):
      jax.block_until_ready(running)
      self.__exit__()
      if step == self.start:
        jax.profiler.start_trace(str(self.folder))
        self.tracing = True

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *_) -> None:
    if self.tracing:
      jax.profiler.stop_trace()
      self.tracing = False


@contextlib.contextmanager
def sole_use(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other runs out of a workdir; raises UserError when one is in it. A kill lets go."""
  with (workdir / ".lock").open("w") as f:
    if jax.process_index() == 0:
      try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as e:
        raise UserError(f"{workdir} is in use by a run that has not ended") from e
    yield

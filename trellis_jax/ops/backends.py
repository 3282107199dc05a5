"""Which implementation runs a call: a name is a file, "reference" and "xla" here, kernels there.

A backend is a module with

  supports(spec, shapes) -> None, or why it cannot run this call here
  forward(spec, inputs, start, init, rows, save) -> (o, end, kept, saved)
  backward(spec, inputs, start, init, rows, saved, cts) -> (inputs_bar, start_bar, init_bar)
  step(spec, memory, state, token) -> (state, o), as `ops/reference.py` has it: may be absent
  widths(spec, shapes) -> the D and V that it is called with (ops/filled.py); absent: any

as `ops/chunked.py` documents them ("reference" alone is a plain function). A backend sees whole
chunks only: `ops/trellis.py` takes the rest of a chunk that an earlier call left unfinished.
"""

import importlib
import logging
import pathlib
from typing import NamedTuple

import pallas_kernels
from trellis_jax.ops import chunked, sharded
from trellis_jax.ops.spec import Spec

_LOG = logging.getLogger("trellis_jax")
_said: set[str] = set()


class Shapes(NamedTuple):
  """The sizes a backend decides on (see trellis_jax.typing); dtype is that of v."""

  B: int
  T: int
  H: int
  D: int
  V: int
  M: int
  dtype: str


def kernels() -> list[str]:
  """Returns the names of the Pallas backends, one per file of `pallas_kernels`."""
  folder = pathlib.Path(pallas_kernels.__file__).parent
  return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def load(name: str):
  """Returns the backend module of a name that `choose` returned."""
  return chunked if name == "xla" else importlib.import_module(f"pallas_kernels.{name}")


def widths(name: str, spec: Spec, shapes: Shapes) -> tuple[int, int]:
  """Returns the widths of keys and values that an implementation runs a call with."""
  own = lambda spec, shapes: (shapes.D, shapes.V)
  return getattr(load(name), "widths", own)(spec, shapes)


def steps(name: str, spec: Spec, shapes: Shapes) -> bool:
  """Whether an implementation takes a single token in its own way, in fp32 and in these widths."""
  if name == "reference" or not hasattr(load(name), "step"):
    return False
  return widths(name, spec, shapes) == (shapes.D, shapes.V)


def choose(name: str | None, spec: Spec, shapes: Shapes) -> str:
  """Returns the implementation to run: `name` itself, or for None the best that supports the call.

  Raises ValueError when the name is unknown or cannot run the call; a name never falls back.
  """
  if name in ("reference", "xla"):
    return name
  known = kernels()
  if name is not None and name not in known:
    accepted = ", ".join(["None", "reference", "xla", *known])
    raise ValueError(f"implementation={name!r} is unknown; accepted are {accepted}")
  mesh = sharded.unmapped()
  reasons = {}
  for n in [name] if name else known:
    own = load(n).supports(spec, shapes)
    reasons[n] = "; ".join(filter(None, (own, mesh))) or None
  for n, reason in reasons.items():
    if reason is None:
      return n
  why = "; ".join(f"{n}: {reason}" for n, reason in reasons.items())
  if name:
    raise ValueError(f"implementation={name!r} cannot run {shapes}: {why}")
  if why and why not in _said:
    _said.add(why)
    _LOG.info("the op runs as 'xla' (%s)", why)
  return "xla"

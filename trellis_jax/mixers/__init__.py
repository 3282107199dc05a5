"""Sequence mixers: a name is a file of this folder, with a `Config` and a `Mixer`.

A mixer that can be computed in several ways also has `implementations()`, their names.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any


def names() -> list[str]:
  """Returns the mixers there are."""
  folder = pathlib.Path(__file__).parent
  return sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "base"))


def get(name: str):
  """Returns the module of a mixer, which holds its `Config` and `Mixer`.

  Raises ValueError for an unknown name, listing the folder.
  """
  if name not in names():
    raise ValueError(f"mixer={name!r} is unknown; accepted are {', '.join(names())}")
  return importlib.import_module(f"{__name__}.{name}")


def configure(name: str, knobs: Mapping[str, Any] | None = None):
  """Returns the Config of a mixer with `knobs` set; ValueError names a knob that is not there."""
  config = get(name).Config
  fields = [f.name for f in dataclasses.fields(config)]
  for knob in knobs or {}:
    if knob not in fields:
      raise ValueError(f"mixer {name!r} has no knob {knob!r}; accepted are {', '.join(fields)}")
  return config(**(knobs or {}))


def assign(implementation: str | None, pattern: tuple[str, ...]) -> dict[str, str | None]:
  """Returns the implementation of each mixer of a model that is called with one name.

  A model of one mixer hands the name on. In a hybrid it goes to the mixers that have one of this
  name, and the others take their best: "cudnn" is attention's alone. Raises ValueError when no
  mixer has it.
  """
  given = dict.fromkeys(pattern, implementation)
  if implementation is None or len(given) == 1:
    return given
  known = {name: getattr(get(name), "implementations", tuple)() for name in given}
  if not any(implementation in names for names in known.values()):
    accepted = "; ".join(f"{n}: {', '.join(names) or 'none'}" for n, names in known.items())
    raise ValueError(
      f"implementation={implementation!r} is of no mixer of the model; accepted are {accepted}"
    )
  return {name: implementation if implementation in known[name] else None for name in given}

"""Sequence mixers: a name is a file of this folder, with a `Config` and a `Mixer`."""

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

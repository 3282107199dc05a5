"""Models that may be compared: the same number of parameters, or of state, from another mixer.

Parameters are matched by the width of the MLPs, in which they are linear; the state by one knob of
the mixer in which it is linear, or by the number of heads, which divides what all heads hold.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
from flax import nnx

from trellis_jax import LM, LMConfig, mixers

TOLERANCE = 0.01  # of what is asked for
# What sizes a state, in the order in which it is tried.
KNOBS = ("num_slots", "cache_length", "head_dim", "num_heads")
STEPS = (8, 4, 2, 1)  # of the MLP's width: the first that comes close enough


class Sizes(NamedTuple):
  """Of a model: parameters; floats and bytes that a row carries; a forward's FLOPs per token."""

  parameters: int
  state_floats: int
  state_bytes: int
  flops: float


def sizes(cfg: LMConfig, num_tokens: int = 2048) -> Sizes:
  """Returns the sizes of a model without making it; FLOPs are those of rows of `num_tokens`."""
  found = {}

  def build():
    lm = LM(cfg, rngs=nnx.Rngs(0))
    found.update(floats=lm.state_size(), flops=lm.flops(num_tokens) / num_tokens)
    return nnx.split(lm, nnx.Param, ...)[1], lm.init_state(1)

  params, state = jax.eval_shape(build)
  count = sum(x.size for x in jax.tree.leaves(params))
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  return Sizes(count, found["floats"], held, found["flops"])


def match(
  cfg: LMConfig,
  *,
  mixer: str | tuple[str, ...] | None = None,
  parameters: int | None = None,
  state: int | None = None,
) -> LMConfig:
  """Returns the config with another mixer and the sizes that are asked for, within 1%.

  Args:
    cfg: what stays as it is, but for `mlp_width` and the mixer's knob.
    mixer: a name or a pattern; None is that of cfg.
    parameters: of the whole model; None leaves them.
    state: floats that a row carries from token to token; None leaves them.

  Raises:
    ValueError: no width or knob comes within 1%; the sentence has the nearest that there is.
  """
  cfg = dataclasses.replace(cfg, mixer=cfg.mixer if mixer is None else mixer)
  if state is not None:
    cfg = _match_state(cfg, state)
  if parameters is not None:
    cfg = _match_parameters(cfg, parameters)
  return cfg


def _match_parameters(cfg: LMConfig, parameters: int) -> LMConfig:
  of = lambda width: dataclasses.replace(cfg, mlp_width=width)
  one = sizes(of(1)).parameters
  slope = sizes(of(2)).parameters - one
  exact = 1 + (parameters - one) / slope
  for step in STEPS:
    width = max(step, round(exact / step) * step)
    given = one + slope * (width - 1)
    if _close(given, parameters):
      return of(width)
  raise ValueError(
    f"parameters={parameters:,} are out of reach for mixer={cfg.mixer!r}: mlp_width={width} has "
    f"{given:,}"
  )


def _match_state(cfg: LMConfig, state: int) -> LMConfig:
  nearest = None
  for change, tried in _states(cfg, state):
    given = sizes(tried).state_floats
    if _close(given, state):
      return tried
    if nearest is None or abs(given - state) < abs(nearest[0] - state):
      nearest = given, change
  said = f"{nearest[1]} has {nearest[0]:,}" if nearest else f"none of {', '.join(KNOBS)} sizes it"
  raise ValueError(f"state={state:,} floats are out of reach for mixer={cfg.mixer!r}: {said}")


def _states(cfg: LMConfig, state: int) -> Iterator[tuple[str, LMConfig]]:
  """Yields ("knob=value", config) that may have the state, the likeliest of each knob."""
  for knob in KNOBS:
    if knob == "num_heads":
      values = [n for n in range(1, cfg.width + 1) if cfg.width % n == 0]
    else:
      values = _solve(cfg, knob, state)
    for value in values:
      tried = _set(cfg, knob, value)
      if tried is not None and _builds(tried):
        yield f"{knob}={value}", tried


def _solve(cfg: LMConfig, knob: str, state: int) -> list[int]:
  """Returns the values of a knob on both sides of the one that a straight line gives."""
  at = [(n, _set(cfg, knob, n)) for n in (8, 16)]
  if any(tried is None or not _builds(tried) for _, tried in at):
    return []
  (a, low), (b, high) = ((n, sizes(tried).state_floats) for n, tried in at)
  if low == high:
    return []
  exact = a + (state - low) * (b - a) / (high - low)
  return [n for n in dict.fromkeys((round(exact), math.floor(exact), math.ceil(exact))) if n >= 1]


def _set(cfg: LMConfig, knob: str, value: int) -> LMConfig | None:
  """Returns the config with a knob set in every mixer that has it; None where none has it."""
  if knob == "num_heads":
    return dataclasses.replace(cfg, num_heads=value)
  fields = lambda name: [f.name for f in dataclasses.fields(mixers.get(name).Config)]
  having = [name for name in set(cfg.pattern) if knob in fields(name)]
  if not having:
    return None
  knobs = {name: dict(cfg.mixers.get(name, {})) | {knob: value} for name in having}
  return dataclasses.replace(cfg, mixers=dict(cfg.mixers) | knobs)


def _builds(cfg: LMConfig) -> bool:
  """Whether the mixers take these sizes."""
  try:
    sizes(cfg)
  except ValueError:
    return False
  return True


def _close(given: int, wanted: int) -> bool:
  return abs(given - wanted) <= TOLERANCE * wanted

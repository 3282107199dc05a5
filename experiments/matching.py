"""Models that may be compared: the same number of parameters, or of state, from another mixer.

Parameters are matched by the width of the MLPs, in which they are linear; the state by the first
knob of the mixer that comes close, or by the number of heads, which divides what all heads hold.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from flax import nnx

from trellis_jax import LM, LMConfig, mixers

TOLERANCE = 0.01  # of what is asked for
# What sizes a state, in the order in which it is tried: fields that are set to one value, and the
# steps of that value; head widths stay even where they can, which rotary positions need.
KNOBS = (
  (("num_slots",), 1),
  (("cache_length",), 1),
  (("state_dim",), 1),
  (("head_dim",), 2),
  (("head_dim", "value_dim"), 2),
  (("head_dim",), 1),
)
LARGEST = 1 << 20
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
  for change, tried, given in _states(cfg, state):
    if _close(given, state):
      return tried
    if nearest is None or abs(given - state) < abs(nearest[0] - state):
      nearest = given, change
  said = f"{nearest[1]} has {nearest[0]:,}" if nearest else "no knob sizes it"
  raise ValueError(f"state={state:,} floats are out of reach for mixer={cfg.mixer!r}: {said}")


def _states(cfg: LMConfig, state: int) -> Iterator[tuple[str, LMConfig, int]]:
  """Yields (change, config, its state): the two nearest of each knob, then all numbers of heads."""
  for fields, step in KNOBS:
    for n in _around(lambda n, fields=fields: _floats(_set(cfg, fields, n)), step, state):
      tried = _set(cfg, fields, n)
      yield " ".join(f"{field}={n}" for field in fields), tried, _floats(tried)
  for heads in (n for n in range(1, cfg.width + 1) if cfg.width % n == 0):
    tried = dataclasses.replace(cfg, num_heads=heads)
    if (given := _floats(tried)) is not None:
      yield f"num_heads={heads}", tried, given


def _around(of: Callable[[int], int | None], step: int, target: int) -> list[int]:
  """Returns the multiples of step on both sides of where `of`, which grows, reaches the target."""
  low, high = step, 2 * step
  if of(low) is None or of(LARGEST) == of(low):
    return []
  while (given := of(high)) is not None and given < target and high < LARGEST:
    low, high = high, 2 * high
  while high - low > step:
    middle = (low + high) // (2 * step) * step
    given = of(middle)
    if given is not None and given < target:
      low = middle
    else:
      high = middle
  reached = [n for n in (low, high) if of(n) is not None]
  return sorted(reached, key=lambda n: abs(of(n) - target))


def _set(cfg: LMConfig, fields: tuple[str, ...], value: int) -> LMConfig | None:
  """Returns the config with a value in all mixers that have the fields; None where none can."""
  known = lambda name: {f.name for f in dataclasses.fields(mixers.get(name).Config)}
  having = [name for name in set(cfg.pattern) if set(fields) <= known(name)]
  knobs = {n: dict(cfg.mixers.get(n, {})) | dict.fromkeys(fields, value) for n in having}
  try:
    return dataclasses.replace(cfg, mixers=dict(cfg.mixers) | knobs) if having else None
  except ValueError:
    return None


def _floats(cfg: LMConfig | None) -> int | None:
  """Returns a model's state, or None where the mixers refuse its sizes."""
  try:
    return None if cfg is None else sizes(cfg).state_floats
  except ValueError:
    return None


def _close(given: int, wanted: int) -> bool:
  return abs(given - wanted) <= TOLERANCE * wanted

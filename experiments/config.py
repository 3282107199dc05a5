"""From the command line to a checked config, and from the config to the model's own.

What can be wrong before a device is touched is said here, as a UserError of one sentence that
states the given value and the accepted ones.
"""

import difflib
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import optim, packing
from experiments.errors import UserError
from trellis_jax import LMConfig

DEFAULT = pathlib.Path(__file__).parent / "configs" / "default.py"

POSITIVE = (lambda x: x >= 1, "at least 1")
NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "at least 0")
ABOVE_ZERO = (lambda x: 0 < x < math.inf, "above 0")
# Of the optimiser, for every config that has one.
OPTIM_RULES = {
  **dict.fromkeys(("optim.peak_lr", "optim.eps"), ABOVE_ZERO),
  **dict.fromkeys(("optim.weight_decay", "optim.clip"), NOT_NEGATIVE),
  **dict.fromkeys(("optim.warmup_steps", "optim.decay_steps"), NOT_NEGATIVE),
  **dict.fromkeys(("optim.b1", "optim.b2"), (lambda x: 0 <= x < 1, "at least 0 and below 1")),
  "seed": (lambda x: 0 <= x < 2**32, "from 0 to 2**32 - 1"),
  "optim.end_lr_ratio": (lambda x: 0 <= x <= 1, "from 0 to 1"),
}
_RULES = {
  **OPTIM_RULES,
  **dict.fromkeys(("steps", "batch_size", "seq_len", "grad_accum"), POSITIVE),
  **dict.fromkeys(("model.width", "model.num_layers", "model.num_heads"), POSITIVE),
  **dict.fromkeys(("checkpoint.every", "checkpoint.keep", "eval.batches"), POSITIVE),
  **dict.fromkeys(("log.every", "profile.steps"), POSITIVE),
  **dict.fromkeys(("optim.z_loss", "eval.every"), NOT_NEGATIVE),
  **dict.fromkeys(("data.align", "model.mlp_width"), NOT_NEGATIVE),
  "profile.start": (lambda x: x == -1 or x >= 1, "a step, or -1 for no profile"),
}
_CHOICES = {
  "data.packing": packing.PACKINGS,
  "optim.schedule": optim.SCHEDULES,
  "model.dtype": ("float32", "bfloat16"),
}


def parse(argv: list[str]) -> ConfigDict:
  """The config that a command line asks for: `--config=FILE` and any `--config.FIELD=VALUE`.

  Raises:
    UserError: there is no such file, field or flag, or a value is of another type than the field.
  """
  base = _load(next((value for name, value in _pairs(argv) if name == "config"), str(DEFAULT)))
  given = {name: value for name, value in _pairs(argv) if name.startswith("config.")}
  for name in given:
    _check_field(base, name)
  try:
    config, rest = _parse_flags(argv)
  except flags.IllegalFlagValueError as e:
    name = re.match(r"flag --(?:no)?(config\.[^=]+)=", str(e))[1]
    kind = type(_lookup(base, name)).__name__
    raise UserError(f"{name} = {given[name]} is given, but the field takes {_A[kind]}") from e
  except flags.Error as e:
    raise UserError(" ".join(str(e).split())) from e
  if rest:
    raise UserError(
      f"argument {rest[0]!r} is no flag; accepted are --config=FILE and --config.FIELD=VALUE"
    )
  return config


def check(cfg: ConfigDict) -> None:
  """Raises UserError for the first field whose value no run could have."""
  check_fields(cfg, _RULES, _CHOICES)
  if not cfg.workdir:
    raise UserError("config.workdir is empty, but it must name a folder, such as runs/default")


def check_fields(cfg: ConfigDict, rules: Mapping[str, Any], choices: Mapping[str, Any]) -> None:
  """Raises UserError for the first field that breaks its rule, or that a schedule has no room for.

  Args:
    cfg: a config with `steps` and a section `optim`.
    rules: (what accepts a value, words for that) by dotted name.
    choices: accepted values by dotted name.
  """
  for name, (accepts, words) in rules.items():
    if not accepts(value := _lookup(cfg, f"config.{name}")):
      raise UserError(f"config.{name} = {value} is given, but it must be {words}")
  for name, accepted in choices.items():
    if (value := _lookup(cfg, f"config.{name}")) not in accepted:
      raise UserError(f"config.{name} = {value!r} is given; accepted are {', '.join(accepted)}")
  for name in ("warmup_steps", "decay_steps")[: 1 + (cfg.optim.schedule == "wsd")]:
    if cfg.optim[name] > cfg.steps:
      raise UserError(
        f"config.optim.{name} = {cfg.optim[name]} is given, but it must be at most "
        f"config.steps = {cfg.steps}"
      )


def lm_config(cfg: ConfigDict, vocab_size: int) -> LMConfig:
  """The model's config from the section `cfg.model`: its own fields, and its mixers' knobs."""
  fields = {k: v for k, v in cfg.items() if not isinstance(v, ConfigDict)}
  fields["mixer"] = mixer_pattern(cfg)
  knobs = {name: cfg[name].to_dict() for name in fields["mixer"] if name in cfg}
  return LMConfig(vocab_size=vocab_size, mixers=knobs, **fields)


def mixer_pattern(cfg: ConfigDict) -> tuple[str, ...]:
  """The names of `cfg.mixer`, "trellis" or "trellis,attention"."""
  return tuple(name.strip() for name in cfg.mixer.split(","))


_A = {"int": "an integer", "float": "a number", "bool": "true or false", "tuple": "a tuple"}


def _pairs(argv: list[str]) -> Iterator[tuple[str, str]]:
  """(name, value) of the flags of a command line, whose values follow after "=" or a space."""
  for arg, following in zip(argv[1:], [*argv[2:], ""]):
    if match := re.match(r"--?([^=]+)(=?)(.*)", arg, re.DOTALL):
      name = re.sub(r"^noconfig\.", "config.", match[1])
      yield name, match[3] if match[2] else following


def _parse_flags(argv: list[str]) -> tuple[ConfigDict, list[str]]:
  """The config of a command line, and its arguments that are no flags."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", str(DEFAULT), flag_values=values, sys_argv=argv)
  rest = values(argv)
  return values["config"].value, rest[1:]


def _load(path: str) -> ConfigDict:
  """The config of a file before the command line changes it."""
  if not pathlib.Path(path.split(":")[0]).is_file():
    raise UserError(f"config file {path!r} does not exist")
  try:
    config, _ = _parse_flags(["", f"--config={path}"])
  except Exception as e:
    if isinstance(e, flags.IllegalFlagValueError):  # whose text is a traceback of the file's error
      e = e.__context__.__context__
    raise UserError(f"config file {path!r} fails with {type(e).__name__}: {e}") from e
  if not isinstance(config, ConfigDict):
    raise UserError(f"config file {path!r} has no get_config() that returns a ConfigDict")
  return config


def _lookup(config: ConfigDict, name: str) -> Any:
  """The value of a dotted name that begins with "config."."""
  for key in name.split(".")[1:]:
    config = config[key]
  return config


def _check_field(config: ConfigDict, name: str) -> None:
  """Raises UserError, naming the fields that there are, unless `name` is one to be set."""
  section, at = config, "config"
  for key in name.split(".")[1:]:
    fields = sorted(section) if isinstance(section, ConfigDict) else []
    if key not in fields:
      near = difflib.get_close_matches(key, fields, 1)
      hint = (
        f"did you mean {at}.{near[0]}?" if near else f"{at} has {', '.join(fields) or 'no fields'}"
      )
      raise UserError(f"{name} is no field of the config; {hint}")
    section, at = section[key], f"{at}.{key}"
  if isinstance(section, ConfigDict):
    raise UserError(f"{name} is a section; its fields are {', '.join(sorted(section))}")

"""From a config of experiments/configs/series to a checked run of one series."""

import hashlib
import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from experiments import config, optim
from experiments.series import data, train
from trellis_jax.forecaster import TOKENS, ForecasterConfig

DEFAULT = config.DEFAULT.parent / "series" / "default.py"

_RULES = {
  **config.OPTIM_RULES,
  **dict.fromkeys(("steps", "batch_size", "lookback", "horizon"), config.POSITIVE),
  **dict.fromkeys(("eval.every", "eval.patience"), config.POSITIVE),
  **dict.fromkeys(("model.width", "model.num_heads", "model.mlp_width"), config.POSITIVE),
  **dict.fromkeys(("model.patch", "model.stride"), config.POSITIVE),
  **dict.fromkeys(("model.num_layers", "model.period"), config.NOT_NEGATIVE),
  "model.dropout": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
}
_CHOICES = {
  "loss": tuple(train.LOSSES),
  "model.tokens": TOKENS,
  "optim.schedule": optim.SCHEDULES,
}


def parse(argv: list[str]) -> ConfigDict:
  """The checked config of a command line; UserError for the first mistake."""
  given = any(arg.lstrip("-").startswith("config=") or arg.lstrip("-") == "config" for arg in argv)
  cfg = config.parse(argv if given else [*argv[:1], f"--config={DEFAULT}", *argv[1:]])
  config.check_fields(cfg, _RULES, _CHOICES)
  return cfg


def load(cfg: ConfigDict) -> data.Series:
  """The series of a config; UserError when there is none."""
  if not cfg.data.path:
    raise data.UserError("config.data.path is empty, but it must name a CSV file")
  return data.load(cfg.data.path, rows=cfg.data.rows, columns=cfg.data.columns)


def forecaster(cfg: ConfigDict, series: data.Series) -> ForecasterConfig:
  """The model's config for a series."""
  fields = {k: v for k, v in cfg.model.items() if not isinstance(v, ConfigDict)}
  names = config.mixer_pattern(cfg.model)
  return ForecasterConfig(
    channels=len(series.columns),
    horizon=cfg.horizon,
    lookback=cfg.lookback,
    mixers={name: cfg.model[name].to_dict() for name in names if name in cfg.model},
    **fields | {"mixer": names, "period": cfg.model.period or series.period},
  )


def decisive(cfg: ConfigDict) -> dict[str, Any]:
  """What of a config decides a run's numbers, apart from its seed; the file by its digest."""
  fields = json.loads(cfg.to_json_best_effort())
  model, pattern = fields["model"], config.mixer_pattern(cfg.model)
  others = [k for k, v in model.items() if isinstance(v, dict) and k not in pattern]
  for name in others:  # knobs of mixers that the model does not have
    model.pop(name)
  fields.pop("seed")
  fields.pop("results")
  fields["data"]["sha256"] = hashlib.sha256(
    pathlib.Path(fields["data"].pop("path")).expanduser().read_bytes()
  ).hexdigest()[:16]
  return fields


def windows(cfg: ConfigDict) -> dict[str, Any]:
  """What of a config decides the windows, and with it what is not ours to set up."""
  fields = decisive(cfg)
  return {"lookback": fields["lookback"], "data": fields["data"]}

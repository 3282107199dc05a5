"""Every mixer at the parameters, or the state, of a config's model.

    python -m experiments.match_mixers --config=experiments/configs/default.py
    python -m experiments.match_mixers --state --config.model.width=512

The model of the config sets what is matched: the parameters, by the width of the MLPs, and with
--state the floats of the state before, by a knob or the number of heads. FLOPs are a forward's per
token over rows of config.seq_len tokens. Exit code 2 for a mistake in what was asked.
"""

import dataclasses
import sys
from collections.abc import Iterator

import tabulate
from ml_collections import ConfigDict

from experiments import config, matching
from trellis_jax import LMConfig, mixers

COLUMNS = ("mixer", "parameters", "state floats", "state bytes", "FLOPs a token", "mlp_width")


def base(cfg: ConfigDict) -> LMConfig:
  """The model's config; without its data, a text's vocabulary is the size that is asked for."""
  sizes = {"byte": 257, "bpe": cfg.data.vocab_size}
  size = sizes.get(cfg.data.tokenizer, cfg.data.vocab_size)
  if cfg.data.task:
    size = cfg.data[cfg.data.task].vocab_size
  return config.lm_config(cfg.model, size)


def rows(cfg: ConfigDict, state: bool) -> Iterator[tuple[list[str], str]]:
  """Yields (cells, why there are none) of every mixer, the config's own first."""
  lm = base(cfg)
  target = matching.sizes(lm, cfg.seq_len)
  own = lm.pattern[0] if len(set(lm.pattern)) == 1 else ",".join(lm.pattern)
  yield _cells(own, lm, target, lm), ""
  for name in mixers.names():
    if name == own:
      continue
    knobs = dict(lm.mixers) | {name: cfg.model[name].to_dict()}
    wanted = dict(parameters=target.parameters, state=target.state_floats if state else None)
    try:
      tried = dataclasses.replace(lm, mixer=name, mixers=knobs)
      matched = matching.match(tried, **wanted)
      yield _cells(name, matched, matching.sizes(matched, cfg.seq_len), tried), ""
    except ValueError as e:
      yield [name, *["-"] * (len(COLUMNS) - 1)], f"{name}: {e}"


def _cells(name: str, lm: LMConfig, sizes: matching.Sizes, before: LMConfig) -> list[str]:
  """The cells of a row; what else than the MLP's width has changed is named."""
  changed = [f"num_heads={lm.num_heads}"] * (lm.num_heads != before.num_heads)
  for knob, value in lm.mixers.get(name, {}).items():
    if value != before.mixers[name].get(knob):
      changed.append(f"{knob}={value}")
  numbers = (f"{round(x):,}" for x in sizes)
  return [name, *numbers, " ".join([str(lm.hidden_width), *changed])]


def main(argv: list[str]) -> int:
  """Prints the table of the command line `argv` and returns the exit code."""
  if {"--help", "-h"} & set(argv):
    print(__doc__)
    return 0
  try:
    cfg = config.parse([arg for arg in argv if arg != "--state"])
    config.check(cfg)
    table, notes = zip(*rows(cfg, "--state" in argv))
  except ValueError as e:
    print("error:", " ".join(str(e).split()), file=sys.stderr)
    return 2
  align = ("left", *["right"] * (len(COLUMNS) - 2), "left")
  print(tabulate.tabulate(table, COLUMNS, "github", colalign=align, disable_numparse=True))
  for note in filter(None, notes):
    print(note)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))

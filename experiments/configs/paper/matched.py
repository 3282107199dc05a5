"""Trellis in Gated DeltaNet's widths and memories, choice by choice and by length.

    python -m experiments.tables.run matched --scale=mini --data=FOLDER --seeds=0,1,2 --rates=1
    python -m experiments.main --config=experiments/configs/paper/matched.py:mini,conv+eps,512

What Table 4 has as `trellis_wide`: as many parameters as Gated DeltaNet, its widths of keys and
values, and its memory, 32 slots. `plain` has values and codes that are linear in a token alone,
values of length 1, and forget gates from 0.98; a row's words are what it has besides:

    conv      a short convolution of the values, which the delta rules have
    silu      SiLU on the values, which Fig. 1 of the paper has
    eps       values v / sqrt(|v|^2 + 1), of which little can be written
    codes     a short convolution of the codes
    f95, f90  forget gates from 0.95, from 0.9
    head      an RMS norm of each head and a SiLU gate, as Gated DeltaNet has them
    linear    linear phi, and layer-normed codes as targets
    fid       no f between the passes
    half      inner steps below 1/2, from 1/4
    start     initial memories that are learned, at first N(0, 1/4^2)
    exact     C = 1

The library's default is what these words would call conv+eps+codes+f95; its rows are `trellis_wide`
of Table 4, where Gated DeltaNet's are too. None has a number in the paper. 125M parameters on
Books: a run takes 1.7e18 FLOPs.
"""

import ml_collections

from experiments.configs import default
from experiments.configs.paper import base, table4

LENGTHS = (512, 2048, 8192)
PLAIN = default.PLAIN | {"v_activation": "none"}
WORDS = {
  "conv": {"v_conv": True},
  "silu": {"v_activation": "silu"},
  "eps": {"v_eps": 1.0},
  "codes": {"alpha_conv": True},
  "f95": {"forget_init": 0.95},
  "f90": {"forget_init": 0.9},
  "head": {"post_norm": "head_rms", "gate": "silu"},
  "linear": {"phi": "identity", "target": "layer_norm"},
  "fid": {"f": "identity"},
  "half": {"step_scale": 0.5, "step_init": 0.25},
  "start": {"initial_memory": "learned", "memory_std": 0.25},
  "exact": {"chunk_size": 1},
}
CHOICES = (
  *("plain", "exact", "f90", "silu", "conv", "conv+silu"),
  *("conv+eps", "conv+silu+eps", "conv+silu+codes", "conv+eps+codes"),
  *("silu+eps+codes", "conv+silu+eps+codes"),
  *("conv+silu+f95", "conv+silu+eps+codes+f95", "conv+eps+codes+f95+half"),
  *("conv+eps+codes+f95+head", "conv+eps+codes+f95+start", "conv+eps+codes+f95+half+start"),
  *("conv+silu+head", "conv+silu+eps+codes+head", "conv+silu+linear", "conv+silu+fid"),
)


def knobs(choice: str) -> dict:
  """What a row's words set."""
  found = dict(PLAIN)
  for word in choice.split("+"):
    if word != "plain":
      found |= WORDS[word]
  return found


def rows(scale: str):
  """Yields the table's rows at a scale."""
  size, data = ("125m", "books") if scale == "paper" else (scale, "")
  for choice in CHOICES:
    wide = table4.WIDE | knobs(choice)
    for context in LENGTHS:
      labels = dict(choice=choice, context=context)
      mlp = table4.matched_mlp(size, wide)
      yield base.row(labels, size, "trellis", context, data=data, mlp_width=mlp, **wide)


def get_config(row: str = "mini,plain,2048") -> ml_collections.ConfigDict:
  """The run of a row, "SCALE,CHOICE,LENGTH"; ValueError for one that is not there."""
  return base.pick(rows, row)

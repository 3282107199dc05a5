"""The paper taken at its word, all at once and choice by choice; 125M, the Pile, T = 2k.

    python -m experiments.tables.run readings --scale=mini --data=FOLDER
    python -m experiments.main --config=experiments/configs/paper/readings.py:paper,literal

The paper writes alpha as a plain linear map, no length for queries, keys and values, an activation
on the values, L2-normalised SiLU for f, the same symbol for phi and for the read, and takes all
inner gradients of a chunk at its start, here in chunks of 16. `default` is the library's reading,
and each other row changes one choice of it into the literal one; none has a number of its own in
the paper. A run takes 1.7e18 FLOPs at the paper's scale.
"""

import ml_collections

from experiments.configs.paper import base

CONTEXT = 2048
CHOICES = {
  "alpha_linear": {"target": "linear"},
  "qk_as_they_come": {"qk_norm": "none"},
  "v_as_they_come": {"v_norm": "none"},
  "v_silu": {"v_activation": "silu"},
  "phi_eps_1e-5": {"phi_eps": 1e-5},
  "f_l2_silu": {"f": "l2_silu"},
  "phi_l2_silu": {"phi": "l2_silu"},
  "read_l2_silu": {"phi_out": "l2_silu"},
  "stale_chunks": {"chunk_size": 16, "curvature": 0.0},
}
LITERAL = {knob: value for change in CHOICES.values() for knob, value in change.items()}


def rows(scale: str):
  """Yields the rows at a scale."""
  size, data = ("125m", "pile") if scale == "paper" else (scale, "")
  for name, knobs in {"default": {}, "literal": LITERAL, **CHOICES}.items():
    yield base.row(dict(row=name), size, "trellis", CONTEXT, data=data, **knobs)


def get_config(row: str = "mini,literal") -> ml_collections.ConfigDict:
  """The run of a row, "SCALE,LABEL"; ValueError for one that is not there."""
  return base.pick(rows, row)

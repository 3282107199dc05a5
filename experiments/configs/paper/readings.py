"""The paper taken at its word, all at once and choice by choice, and what else was tried.

    python -m experiments.tables.run readings --scale=mini --data=FOLDER
    python -m experiments.main --config=experiments/configs/paper/readings.py:paper,literal

The paper writes alpha as a plain linear map, no length for queries, keys and values, an activation
on the values and convolves neither, L2-normalised SiLU for f, the same symbol for phi and for the
read, and takes all inner gradients of a chunk at its start, here in chunks of 16. `default` is the
library's reading, and each row after `literal` changes one choice of it, first into the paper's,
then into what else was tried; `own_map_of_queries` has more parameters, a twentieth at mini. None
has a number in the paper. 125M parameters on the Pile, T = 2k: a run takes 1.7e18 FLOPs at the
paper's scale.
"""

import ml_collections

from experiments.configs import default
from experiments.configs.paper import base

CONTEXT = 2048
CHOICES = {
  "alpha_linear": {"target": "linear"},
  "qk_as_they_come": {"qk_norm": "none"},
  "v_as_they_come": {"v_norm": "none"},
  "v_silu": {"v_activation": "silu"},
  "v_from_one_token": {"v_conv": False},
  "alpha_from_one_token": {"alpha_conv": False},
  "phi_eps_1e-5": {"phi_eps": 1e-5},
  "f_l2_silu": {"f": "l2_silu"},
  "phi_l2_silu": {"phi": "l2_silu"},
  "read_l2_silu": {"phi_out": "l2_silu"},
  "stale_chunks": {"chunk_size": 16, "curvature": 0.0},
}
TRIED = {
  "phi_and_target_linear": {"phi": "identity", "target": "layer_norm"},
  "phi_eps_0.25": {"phi_eps": 0.25},
  "steps_up_to_2": {"step_scale": 2.0, "step_init": 1.0},
  "curvature_0.5": {"curvature": 0.5},
  "forget_by_rate": {"forget_form": "rate"},
  "forget_from_0.9": {"forget_init": 0.9},
  "forget_from_0.98": {"forget_init": 0.98},
  "forget_from_0.998": {"forget_init": 0.998},
  "learned_first_memory": {"initial_memory": "learned"},
  "keys_from_the_present": {"conv_decay": 0.0},
  "taps_spread": {"conv_spread": 0.5},
  "own_map_of_queries": {"share_qk": False},
  "values_of_length_1": {"v_eps": 1e-6},
  "plain": default.PLAIN,
  "f_eps_1": {"eps": 1.0},
  "silu_gate_norm_by_head": {"gate": "silu", "post_norm": "head_rms"},
  "first_order": {"outer_gradient": 0.0},
}
LITERAL = {knob: value for change in CHOICES.values() for knob, value in change.items()}


def rows(scale: str):
  """Yields the rows at a scale."""
  size, data = ("125m", "pile") if scale == "paper" else (scale, "")
  for name, knobs in {"default": {}, "literal": LITERAL, **CHOICES, **TRIED}.items():
    yield base.row(dict(row=name), size, "trellis", CONTEXT, data=data, **knobs)


def get_config(row: str = "mini,literal") -> ml_collections.ConfigDict:
  """The run of a row, "SCALE,LABEL"; ValueError for one that is not there."""
  return base.pick(rows, row)

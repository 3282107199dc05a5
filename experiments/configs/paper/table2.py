"""Table 2: ablations at 125M, the Pile, T = 2k. Each row but the first two is a change of Trellis.

    python -m experiments.tables.run table2 --scale=mini --data=FOLDER
    python -m experiments.main --config=experiments/configs/paper/table2.py:paper,no_forget

The paper has Trellis at 10.87, without the forget gate at 11.28, with linear phi at 11.65. A run
takes 1.7e18 FLOPs. Rows have the library's defaults where their name does not say otherwise, such
as linearised chunks of 64 tokens and no activation on the read. `exact` is C = 1. In the stale rows
all inner gradients of a chunk are taken at its start; steps start at 1 / C there, but in
`stale_64_half` at 1/2, as they do in linearised chunks. The stale rows, `read_ln_silu` and
`literal` have no number in the paper. The last is its text taken at its word (raw linear targets,
writes as they come, eps 1e-5 in phi, L2-SiLU for f and on the read, stale chunks); readings.py has
each of these choices alone. In rows named plain_ values and codes have no convolution, values have
length 1 and forget gates start at .98.
"""

import ml_collections

from experiments.configs import default
from experiments.configs.paper import base, readings

CONTEXT = 2048
ROWS = {  # mixer, and its knobs where they are not the defaults
  "delta_net": ("delta_net", {}),
  "ttt_linear": ("ttt_linear", {}),
  "trellis": ("trellis", {}),
  "no_forget": ("trellis", {"forget": False}),
  "f_l2_silu": ("trellis", {"f": "l2_silu"}),
  "f_softmax": ("trellis", {"f": "softmax"}),
  "linear_phi_f_softmax": ("trellis", {"phi": "identity", "f": "softmax"}),
  "linear_phi_f_ln_silu": ("trellis", {"phi": "identity"}),
  "slots_32": ("trellis", {"num_slots": 32}),
  "slots_128": ("trellis", {"num_slots": 128}),
  "exact": ("trellis", {"chunk_size": 1}),
  "read_ln_silu": ("trellis", {"phi_out": "ln_silu"}),
  "stale_16": ("trellis", {"chunk_size": 16, "curvature": 0.0}),
  "stale_64": ("trellis", {"chunk_size": 64, "curvature": 0.0}),
  "stale_64_half": ("trellis", {"chunk_size": 64, "curvature": 0.0, "step_init": 0.5}),
  "literal": ("trellis", readings.LITERAL),
}
PLAIN = (
  *("trellis", "no_forget", "f_softmax", "linear_phi_f_ln_silu"),
  *("exact", "read_ln_silu", "stale_16", "stale_64"),
)
ROWS |= {f"plain_{name}": ("trellis", default.PLAIN | ROWS[name][1]) for name in PLAIN}
PUBLISHED = {
  "delta_net": 11.58,
  "ttt_linear": 11.44,
  "trellis": 10.87,
  "no_forget": 11.28,
  "f_l2_silu": 10.98,
  "f_softmax": 11.29,
  "linear_phi_f_softmax": 12.71,
  "linear_phi_f_ln_silu": 11.65,
  "slots_32": 11.14,
  "slots_128": 10.87,
  "exact": 10.75,
}


def rows(scale: str):
  """Yields the table's rows at a scale."""
  size, data = ("125m", "pile") if scale == "paper" else (scale, "")
  for name, (mixer, knobs) in ROWS.items():
    number = PUBLISHED.get(name)
    yield base.row(dict(row=name), size, mixer, CONTEXT, data=data, published=number, **knobs)


def get_config(row: str = "mini,trellis") -> ml_collections.ConfigDict:
  """The run of a row, "SCALE,LABEL"; ValueError for one that is not there."""
  return base.pick(rows, row)

r"""Table 4: perplexity by the length that a model is trained at, seven mixers.

    python -m experiments.tables.run table4 --scale=mini --data=FOLDER
    python -m experiments.main \
      --config=experiments/configs/paper/table4.py:paper,trellis,125m,books,512

The paper has Trellis at 10.87 and 10.60 on the Pile at 2k and 8k, at 19.09 with 512 to 17.18 with
32k tokens of Books, and at 8.26 with 350M parameters. A run of the 125M size takes 1.7e18 FLOPs,
one of the 350M size 1.6e19. At the small scales the text is the one that is given, at all lengths
of Books that a step has room for: 8k at mini, 32k at small; and there are state-matched Trellis
besides, of M = 32 and as many parameters. `trellis_m32` has memories as large as DeltaNet's, and
`trellis_wide` those of Gated DeltaNet and its widths, keys of 3/4 and values of 3/2 of the model's;
both in the default's chunks, which keep the memory at the chunk's start besides, and as the exact
recurrence (C = 1), which keeps nothing else. `trellis_wide_spread` starts features and heads
apart, their taps and the lengths of their memories, for models whose learning rates are too low to
move them far. `matched.py` has what else was tried there.
"""

import math

import ml_collections

from experiments.configs.paper import base

BOOKS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
# (size, corpus, length) of the paper's columns, and their perplexities by model.
COLUMNS = (
  ("125m", "pile", 2048),
  ("125m", "pile", 8192),
  *(("125m", "books", length) for length in BOOKS),
  ("350m", "pile", 2048),
)
PUBLISHED = {
  "attention": (11.58, 11.75, 20.60, 19.39, 18.89, 18.38, 18.85, 29.41, None, 8.48),
  "linear_attention": (12.43, 13.26, 20.84, 19.96, 19.60, 19.64, 20.34, 21.87, 25.07, 9.16),
  "delta_net": (11.58, 11.53, 20.21, 19.21, 18.44, 17.90, 18.05, 18.40, 19.48, 8.62),
  "mamba2": (11.47, 11.35, 19.96, 18.89, 18.19, 18.07, 18.23, 18.40, 19.33, 8.56),
  "gated_delta_net": (11.31, 10.95, 19.71, 18.62, 17.85, 17.48, 17.40, 17.85, 18.38, 8.53),
  "ttt_linear": (11.44, 11.29, 19.91, 18.78, 18.19, 18.03, 18.54, 18.29, 19.16, 8.62),
  "trellis": (10.87, 10.60, 19.09, 17.92, 17.19, 16.71, 16.56, 16.58, 17.18, 8.26),
}
TOKENS = {"125m": 2.4e9, "350m": 7.5e9}
# At the small scales, where heads are 64 wide. `wide` has Gated DeltaNet's keys and values.
WIDE = {"num_slots": 32, "head_dim": 48, "value_dim": 96}
MATCHED = {
  "trellis_m32": {"num_slots": 32},
  "trellis_m32_exact": {"num_slots": 32, "chunk_size": 1},
  "trellis_wide": WIDE,
  "trellis_wide_exact": WIDE | {"chunk_size": 1},
  "trellis_wide_spread": WIDE | {"conv_spread": 0.5, "forget_form": "rate"},
}


def matched_mlp(name: str, knobs: dict) -> int:
  """The MLP's width that makes up for the columns which a Trellis has less or more than M = 64."""
  size = base.SIZES[name]
  keys, values = knobs.get("head_dim", 64), knobs.get("value_dim", 64)
  # Maps of queries and keys, alpha; of values, gate and output. A feature of SwiGLU has 3 columns.
  less = size.num_heads * ((64 - keys) + (64 - knobs["num_slots"]) + 3 * (64 - values))
  return size.mlp_widths[-1] + 8 * math.ceil(less / 3 / 8)


def rows(scale: str):
  """Yields the table's rows at a scale."""
  if scale == "paper":
    for model, numbers in PUBLISHED.items():
      for (size, data, context), number in zip(COLUMNS, numbers):
        labels = dict(model=model, size=size, data=data, context=context)
        yield base.row(
          labels, size, model, context, tokens=TOKENS[size], data=data, published=number
        )
    return
  for model in (*PUBLISHED, *MATCHED):
    mixer, knobs = ("trellis", MATCHED[model]) if model in MATCHED else (model, {})
    mlp = matched_mlp(scale, knobs) if model in MATCHED else 0
    books = dict(zip(BOOKS, PUBLISHED.get(model, ())[2:]))
    for context in base.contexts(scale, BOOKS):
      labels, number = dict(model=model, context=context), books.get(context)
      yield base.row(labels, scale, mixer, context, published=number, mlp_width=mlp, **knobs)


def get_config(row: str = "mini,trellis,2048") -> ml_collections.ConfigDict:
  """The run of a row, "SCALE,LABEL,..."; ValueError for one that is not there."""
  return base.pick(rows, row)

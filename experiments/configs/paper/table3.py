"""Table 3: RULER's S-NIAH 1 to 3 of five models of "1B", percent of the needles that are found.

    python -m experiments.tables.run table3 --scale=mini --data=FOLDER --tasks=FOLDER
    python -m experiments.main --config=experiments/configs/paper/table3.py:paper,trellis

The paper has Trellis at 99.2 to 97.8 on S-NIAH-1 from 2k to 8k, at 99.4 to 34.6 on S-NIAH-2, at
86.4 to 28.4 on S-NIAH-3 from 1k to 4k. --tasks names the text that needles hide in (see
experiments/evals/niah.py). A run takes 2.2e20 FLOPs. Size, corpus and the length that the models
were trained at are not stated; here they are TTT's 1.3B, C4 and 4k, and at mini 4k too. At the
small scales the text is the one that is given; `python -m experiments.needle_text` writes one of
needles and their answers.
"""

import ml_collections

from experiments.configs.paper import base

CONTEXT = 4096
CELLS = tuple(
  (kind, length)
  for kind, lengths in (
    ("niah_single_1", (2048, 4096, 8192)),
    ("niah_single_2", (2048, 4096, 8192)),
    ("niah_single_3", (1024, 2048, 4096)),
  )
  for length in lengths
)
PUBLISHED = {
  "ttt_linear": (98.4, 98.8, 98.0, 60.2, 36.6, 10.2, 85.8, 78.8, 28.0),
  "mamba2": (98.6, 61.4, 31.0, 98.4, 55.8, 14.2, 62.2, 42.2, 4.2),
  "delta_net": (96.8, 98.8, 98.6, 47.2, 15.4, 12.8, 85.2, 46.2, 20.0),
  "gated_delta_net": (89.8, 91.4, 90.0, 99.2, 91.8, 26.4, 86.4, 82.6, 24.4),
  "trellis": (99.2, 95.2, 97.8, 99.4, 94.2, 34.6, 86.4, 82.8, 28.4),
}


def rows(scale: str):
  """Yields the table's rows at a scale."""
  size, data = ("1.3b", "c4") if scale == "paper" else (scale, "")
  for model, numbers in PUBLISHED.items():
    yield base.row(dict(model=model), size, model, CONTEXT, data=data, published=numbers)


def get_config(row: str = "mini,trellis") -> ml_collections.ConfigDict:
  """The run of a row, "SCALE,LABEL"; ValueError for one that is not there."""
  return base.pick(rows, row)

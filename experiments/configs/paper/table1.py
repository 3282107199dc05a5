"""Table 1: common sense, zero-shot, of five models of 780M trained on 30 billion tokens of C4.

    python -m experiments.tables.run table1 --scale=mini --data=FOLDER --tasks=FOLDER
    python -m experiments.main --config=experiments/configs/paper/table1.py:paper,trellis

The paper has Trellis at a perplexity of 20.28 on LAMBADA and at 48.38% right on average. --tasks
names the folder of the tasks' files (see experiments/evals/harness.py). A run takes 1.4e20 FLOPs.
The length that the models were trained at is not stated; it is 2k here.
"""

import ml_collections

from experiments.configs.paper import base

CONTEXT = 2048
# LAMBADA's perplexity, then percent right of these tasks.
TASKS = (
  *("lambada_openai", "piqa", "hellaswag", "winogrande"),
  *("arc_easy", "arc_challenge", "social_iqa"),
)
PUBLISHED = {
  "attention": (25.89, 33.41, 64.75, 41.98, 51.33, 59.06, 31.85, 40.26),
  "mamba2": (28.91, 32.72, 64.98, 42.60, 50.01, 61.99, 30.24, 41.07),
  "ttt_linear": (27.05, 33.18, 65.03, 43.17, 49.93, 62.16, 32.13, 41.35),
  "gated_delta_net": (21.40, 34.83, 65.79, 43.66, 50.45, 64.02, 32.24, 41.68),
  "trellis": (20.28, 35.44, 67.51, 44.29, 51.08, 65.12, 33.17, 42.04),
}


def rows(scale: str):
  """Yields the table's rows at a scale."""
  size, data = ("780m", "c4") if scale == "paper" else (scale, "")
  for model, numbers in PUBLISHED.items():
    yield base.row(dict(model=model), size, model, CONTEXT, data=data, published=numbers)


def get_config(row: str = "mini,trellis") -> ml_collections.ConfigDict:
  """The run of a row, "SCALE,LABEL"; ValueError for one that is not there."""
  return base.pick(rows, row)

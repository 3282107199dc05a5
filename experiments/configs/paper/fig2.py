"""Fig. 2, top: perplexity on C4 by the length that a model is trained at, two sizes.

    python -m experiments.tables.run fig2 --scale=mini --data=FOLDER
    python -m experiments.main --config=experiments/configs/paper/fig2.py:paper,trellis,350m,2048

The paper's numbers were read off the figure, to .02: Trellis at 18.65 with 2k to 16.52 with 16k in
the panel that is captioned 350M, at 22.04 to 20.91 in the one captioned 780M; the larger model is
the worse one there, so the captions look swapped. A run of the 350M size takes 3.3e19 FLOPs, one
of the 780M size 1.4e20. At the small scales there is one size, and the paper's numbers beside it
are the first panel's.
"""

import ml_collections

from experiments.configs.paper import base

LENGTHS = (2048, 4096, 8192, 16384)
MODELS = {  # mixer, and its knobs where they are not the defaults
  **{name: (name, {}) for name in ("attention", "mamba2", "gsa", "ttt_linear")},
  "no_forget": ("trellis", {"forget": False}),
  "trellis": ("trellis", {}),
}
PUBLISHED = {
  "350m": {
    "attention": (19.31, 17.43, 17.62, 18.54),
    "mamba2": (19.1, 17.43, 17.46, 18.39),
    "gsa": (19.1, 17.30, 17.45, 18.32),
    "ttt_linear": (19.11, 17.40, 17.68, 18.54),
    "no_forget": (19.11, 17.29, 17.70, 18.21),
    "trellis": (18.65, 17.03, 16.77, 16.52),
  },
  "780m": {
    "attention": (22.91, 22.26, 22.53, 24.24),
    "mamba2": (22.89, 21.98, 22.21, 22.93),
    "gsa": (22.64, 21.75, 22.00, 22.65),
    "ttt_linear": (23.33, 21.96, 22.16, 22.54),
    "no_forget": (22.48, 21.54, 21.83, 22.24),
    "trellis": (22.04, 20.81, 20.41, 20.91),
  },
}


def rows(scale: str):
  """Yields the figure's points at a scale."""
  for size, panel in PUBLISHED.items():
    for model, (mixer, knobs) in MODELS.items():
      for context, number in zip(LENGTHS, panel[model]):
        if scale == "paper":
          labels = dict(model=model, size=size, context=context)
          yield base.row(labels, size, mixer, context, data="c4", published=number, **knobs)
        elif context <= base.BATCH_TOKENS[scale]:
          labels = dict(model=model, context=context)
          yield base.row(labels, scale, mixer, context, published=number, **knobs)
    if scale != "paper":
      return


def get_config(row: str = "mini,trellis,2048") -> ml_collections.ConfigDict:
  """The run of a point, "SCALE,LABEL,..."; ValueError for one that is not there."""
  return base.pick(rows, row)

"""Fig. 3: perplexity on C4 by the FLOPs of the training.

    python -m experiments.tables.run fig3 --scale=mini --data=FOLDER
    python -m experiments.main --config=experiments/configs/paper/fig3.py:paper,trellis,350m

The paper's numbers were read off the figure: Trellis at 23.71, 20.80, 19.31 and 18.26 at 1.9e18,
2.0e19, 7.9e19 and 2.0e20 FLOPs. The paper does not say which runs these are; sizes and tokens of
TTT's authors (125M on 2.4, 350M on 7.5, 780M on 15 and 1.3B on 26 billion tokens, T = 2k) take
nearly as many and are taken here. At the small scales one size is trained on 1/4, 1/2, 1 and 2
times its tokens.
"""

import ml_collections

from experiments.configs.paper import base

CONTEXT = 2048
FLOPS = (1.9e18, 2.0e19, 7.9e19, 2.0e20)
RUNS = (("125m", 2.4e9), ("350m", 7.5e9), ("780m", 15e9), ("1.3b", 26e9))
PARTS = (0.25, 0.5, 1, 2)
PUBLISHED = {
  "attention": (25.33, 22.28, 20.74, 19.40),
  "gsa": (24.24, 21.78, 20.51, 19.27),
  "mamba2": (24.64, 22.29, 20.74, 19.3),
  "ttt_linear": (24.68, 22.09, 20.68, 19.36),
  "trellis": (23.71, 20.80, 19.31, 18.26),
}


def rows(scale: str):
  """Yields the figure's points at a scale."""
  for model, numbers in PUBLISHED.items():
    for number, (size, tokens), part in zip(numbers, RUNS, PARTS):
      if scale == "paper":
        labels, budget = dict(model=model, size=size), tokens
        yield base.row(labels, size, model, CONTEXT, tokens=budget, data="c4", published=number)
      else:
        labels, budget = dict(model=model, part=part), part * base.SIZES[scale].tokens
        yield base.row(labels, scale, model, CONTEXT, tokens=budget, published=number)


def get_config(row: str = "mini,trellis,1") -> ml_collections.ConfigDict:
  """The run of a point, "SCALE,LABEL,..."; ValueError for one that is not there."""
  return base.pick(rows, row)

"""Fig. 3: perplexity by the FLOPs of the training."""

import pathlib

from experiments.configs.paper import fig3
from experiments.tables import figures, language, page


def plot(found: list[language.Group]):
  """The paper's points, and each of our groups, ours at the FLOPs that were spent."""
  flops = dict(zip((size for size, _ in fig3.RUNS), fig3.FLOPS))
  shown = figures.published(list(fig3.rows("paper")), lambda labels: flops[labels["size"]])
  panels = [("the paper: C4", shown)]
  spent = lambda labels, line: line["flops"]
  panels += [(group.title, figures.points(group, spent)) for group in found]
  return {"fig3": figures.lines(panels, "Perplexity by compute", "FLOPs", ticks=False)}


def build(results: pathlib.Path) -> page.Page:
  """The page of Fig. 3."""
  lines = language.read(results, "fig3")
  return language.build("fig3", "Fig. 3: perplexity by compute", lines, figures=plot)

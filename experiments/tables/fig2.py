"""Fig. 2, top: perplexity by the length that a model is trained at, on C4, at two sizes."""

import pathlib

from experiments.configs.paper import fig2
from experiments.tables import figures, language, page


def plot(found: list[language.Group]):
  """The paper's two panels, and each of our groups."""
  x_of, panels = lambda labels, *_: labels["context"], []
  for size in fig2.PUBLISHED:
    keep = lambda labels, size=size: labels["size"] == size
    shown = figures.published(list(fig2.rows("paper")), x_of, keep)
    panels.append((f"the paper: C4, captioned {size.upper()}", shown))
  for group in found:
    if group.scale != "paper":
      panels.append((group.title, figures.points(group, x_of)))
      continue
    for size in fig2.PUBLISHED:
      keep = lambda labels, size=size: labels["size"] == size
      panels.append((f"{size}, {group.title}", figures.points(group, x_of, keep)))
  return {"fig2": figures.lines(panels, "Perplexity by context", "T of training and test")}


def build(results: pathlib.Path) -> page.Page:
  """The page of Fig. 2."""
  lines = language.read(results, "fig2")
  return language.build("fig2", "Fig. 2: perplexity by context on C4", lines, figures=plot)

"""Table 2: what each part of Trellis is worth."""

import pathlib

from experiments.configs.paper import table2
from experiments.tables import figures, language, page

CLAIMED = ("no_forget", "linear_phi_f_ln_silu", "f_softmax")  # each costs perplexity in the paper


def notes(group: language.Group) -> list[str]:
  """Whether the ablations that cost perplexity in the paper do so here."""
  said = []
  for kind in ("", "plain_"):
    base = group.mean(dict(row=f"{kind}trellis"))
    for name in CLAIMED:
      value = group.mean(dict(row=kind + name))
      if base is None or value is None:
        said.append(f"{kind}{name}: {page.NOT_RUN}.")
        continue
      word = "costs" if value > base else "does NOT cost"
      there = table2.PUBLISHED[name] - table2.PUBLISHED["trellis"]
      cost = f"{value - base:+.2f} (the paper: {there:+.2f})"
      said.append(f"{kind}{name} {word} perplexity: {cost}.")
  return said


def plot(found: list[language.Group]):
  """A dot for each row, the paper's and each of our groups."""
  panels = [
    ("the paper: 125M, Pile", {n: figures.Point.of(0, [v]) for n, v in table2.PUBLISHED.items()})
  ]
  for group in found:
    values = {row.labels["row"]: group.values(row.labels) for row in group.rows}
    panels.append((group.title, {name: figures.Point.of(0, v) for name, v in values.items() if v}))
  return {"table2": figures.dots(panels, "Ablations", "perplexity")}


def build(results: pathlib.Path) -> page.Page:
  """The page of Table 2."""
  return language.build(
    "table2", "Table 2: ablations", language.read(results, "table2"), notes=notes, figures=plot
  )

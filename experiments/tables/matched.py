"""Trellis in Gated DeltaNet's memory, choice by choice, and how far it is from it."""

import math
import pathlib
import statistics

from experiments.tables import figures, language, page
from experiments.tables import lines as lines_lib

# Of Table 4: rows of the same widths and memories.
BESIDE = {"gated_delta_net": "Gated DeltaNet", "trellis_wide": "the library's default"}


class Beside:
  """Table 4's perplexities on a group's text and tokens."""

  def __init__(self, lines: list[lines_lib.Line], group: language.Group):
    same = {k: group.lines[0][k] for k in ("scale", "tokens", "corpus_digest")}
    self.lines = lines_lib.select(lines, same)

  def perplexities(self, model: str, context: int) -> list[float]:
    """Those of a model at its best rate, by seed; [] unless all are finite."""
    labels = {"model": model, "context": context}
    found = lines_lib.best(lines_lib.select(self.lines, {"labels": labels}))
    failed = any(line["failure"] for line in found)
    return [] if failed else [line["test"]["perplexity"] for line in found]


def by_choice(group: language.Group, beside: Beside) -> dict[int, dict[str, list[float]]]:
  """Perplexities by length and by name, the rows of Table 4 first."""
  found = {}
  for row in group.rows:
    choice, context = row.labels.values()
    if context not in found:
      of_table4 = {name: beside.perplexities(m, context) for m, name in BESIDE.items()}
      found[context] = {name: values for name, values in of_table4.items() if values}
    if values := group.values(row.labels):
      found[context][choice] = values
  return found


def notes(group: language.Group, beside: Beside) -> list[str]:
  """Each choice's distance from Gated DeltaNet."""
  said, rival = [], BESIDE["gated_delta_net"]
  for context, values in by_choice(group, beside).items():
    theirs = values.pop(rival, None)
    if not (theirs and values):
      continue
    far = {name: _nats(mine) - _nats(theirs) for name, mine in values.items()}
    listed = ", ".join(f"{name} {far[name]:+.3f}" for name in sorted(far, key=far.get))
    said.append(
      f"T = {context}: {rival} has {page.spread(theirs)}, {len(theirs)} seeds "
      f"([Table 4](table4.md)). Nats a token more than it, means over seeds: {listed}."
    )
  return said


def plot(found: list[language.Group], lines: list[lines_lib.Line]):
  """A dot for each choice, a panel for each length that was run."""
  point = lambda values: figures.Point(0, statistics.fmean(values), min(values), max(values))
  panels = []
  for group in found:
    for context, values in by_choice(group, Beside(lines, group)).items():
      points = {name: point(v) for name, v in values.items()}
      panels.append((f"T = {context}", points))
  title = "In Gated DeltaNet's memory; " + "; ".join(group.title for group in found)
  ours = BESIDE["trellis_wide"]
  return {"matched": figures.dots(panels, title, "perplexity", ours)} if panels else {}


def build(results: pathlib.Path) -> page.Page:
  """The page of the choices."""
  table4 = language.read(results, "table4")
  return language.build(
    "matched",
    "Trellis in Gated DeltaNet's memory, choice by choice",
    language.read(results, "matched"),
    notes=lambda group: notes(group, Beside(table4, group)),
    figures=lambda found: plot(found, table4),
  )


def _nats(perplexities: list[float]) -> float:
  """The mean loss of some runs, in nats a token."""
  return statistics.fmean(map(math.log, perplexities))

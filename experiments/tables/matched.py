"""Trellis in Gated DeltaNet's memory, choice by choice, and how far it is from it.

All are compared at the learning rate that all have run with, the middle one of the scale's three:
Gated DeltaNet and the default have the others too, in Table 4.
"""

import dataclasses
import math
import pathlib
import statistics

from experiments.tables import figures, language, page
from experiments.tables import lines as lines_lib

# Of Table 4: rows of the same widths and memories.
BESIDE = {"gated_delta_net": "Gated DeltaNet", "trellis_wide": "the library's default"}


def by_choice(
  group: language.Group, table4: list[lines_lib.Line]
) -> dict[int, dict[str, list[float]]]:
  """Perplexities at one rate, by length and name; Table 4's on the same text and tokens first."""
  same = {k: group.lines[0][k] for k in ("scale", "tokens", "corpus_digest")}
  at = {"peak_lr": _rate(group)}
  beside = language.Group(group.scale, [], lines_lib.select(table4, same | at))
  group = dataclasses.replace(group, lines=lines_lib.select(group.lines, at))
  found = {}
  for row in group.rows:
    choice, context = row.labels.values()
    if context not in found:
      theirs = {n: beside.values(dict(model=m, context=context)) for m, n in BESIDE.items()}
      found[context] = {name: values for name, values in theirs.items() if values}
    if values := group.values(row.labels):
      found[context][choice] = values
  return found


def notes(group: language.Group, table4: list[lines_lib.Line]) -> list[str]:
  """Each choice's distance from Gated DeltaNet."""
  said, rival = [], BESIDE["gated_delta_net"]
  for context, values in by_choice(group, table4).items():
    theirs = values.pop(rival, None)
    if not (theirs and values):
      continue
    far = {name: _nats(mine) - _nats(theirs) for name, mine in values.items()}
    listed = ", ".join(f"{name} {far[name]:+.3f}" for name in sorted(far, key=far.get))
    said.append(
      f"T = {context}: {rival} has {page.spread(theirs)}, {len(theirs)} seeds "
      f"([Table 4](table4.md)), all at {_rate(group):g}. Nats a token more than it, means over "
      f"seeds: {listed}."
    )
  return said


def plot(found: list[language.Group], table4: list[lines_lib.Line]):
  """A dot for each choice, a panel for each length that was run."""
  panels = []
  for group in found:
    for context, values in by_choice(group, table4).items():
      points = {name: figures.Point.of(0, v) for name, v in values.items()}
      panels.append((f"T = {context}", points))
  of = (f"{group.title} at {_rate(group):g}" for group in found)
  title = "In Gated DeltaNet's memory; " + "; ".join(of)
  ours = BESIDE["trellis_wide"]
  return {"matched": figures.dots(panels, title, "perplexity", ours)} if panels else {}


def build(results: pathlib.Path) -> page.Page:
  """The page of the choices."""
  table4 = language.read(results, "table4")
  return language.build(
    "matched",
    "Trellis in Gated DeltaNet's memory, choice by choice",
    language.read(results, "matched"),
    notes=lambda group: notes(group, table4),
    figures=lambda found: plot(found, table4),
  )


def _rate(group: language.Group) -> float:
  """The learning rate of every choice: a scale's middle one."""
  return group.rows[0].rates[1]


def _nats(perplexities: list[float]) -> float:
  """The mean loss of some runs, in nats a token."""
  return statistics.fmean(map(math.log, perplexities))

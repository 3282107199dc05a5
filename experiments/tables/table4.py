"""Table 4: perplexity by the length that a model is trained at."""

import pathlib
import statistics

from experiments.configs.paper import table4
from experiments.tables import figures, language, page

OURS, RIVAL = "trellis", "gated_delta_net"


def notes(group: language.Group) -> list[str]:
  """Who is ahead at each length, and whether the gap grows with it, as the paper says."""
  said = []
  for model in (OURS, *table4.MATCHED):
    said += _beside_rival(group, model)
  return said


def _beside_rival(group: language.Group, model: str) -> list[str]:
  """Over the seeds that both have been run with: at a small scale these can weigh the most."""
  said, gaps, name = [], {}, language.NAMES[model]
  books = dict(zip(table4.BOOKS, zip(table4.PUBLISHED[RIVAL][2:], table4.PUBLISHED[OURS][2:])))
  for context in dict.fromkeys(row.labels["context"] for row in group.rows):
    both = group.beside(*(dict(model=m, context=context) for m in (model, RIVAL))).values()
    if not both:
      continue
    here, there = map(statistics.fmean, zip(*both))
    gaps[context], (rival, ours) = there - here, books[context]
    by_seed = language.by_seed(theirs - mine for mine, theirs in both)
    paper = f" (the paper, Books at 125M: {rival - ours:+.2f})" if model == OURS else ""
    said.append(
      f"T = {context}: {name} {here:.2f} is {'below' if here < there else 'NOT below'} Gated "
      f"DeltaNet {there:.2f}, gap {gaps[context]:+.2f}{by_seed}{paper}, "
      f"{language.seeds(len(both))}."
    )
  if len(gaps) > 1:
    first, last = min(gaps), max(gaps)
    word = "does not shrink" if gaps[last] >= gaps[first] else "SHRINKS"
    said.append(
      f"The gap of {name} to Gated DeltaNet {word} from T = {first} ({gaps[first]:+.2f}) to {last} "
      f"({gaps[last]:+.2f})."
    )
  return said


def positions(group: language.Group) -> str:
  """Perplexity by position at the longest length that was run."""
  of = lambda row: group.of(row.labels) if group.values(row.labels) else []
  have = [row for row in group.rows if of(row)]
  if not have:
    return ""
  longest = max(row.labels["context"] for row in have)
  have = [row for row in have if row.labels["context"] == longest]
  buckets = [part["first"] for part in of(have[0])[0]["test"]["by_position"]]
  body = []
  for row in have:
    parts = [line["test"]["by_position"] for line in of(row)]
    cells = (page.spread([p[i]["perplexity"] for p in parts]) for i in range(len(buckets)))
    body.append([language.NAMES[row.labels["model"]], *cells])
  return page.table(body, [f"T = {longest}, from token", *map(str, buckets)])


def plot(found: list[language.Group]):
  """The paper's Books columns, and each of our groups of several points."""
  x_of = lambda labels, *_: labels["context"]
  books = figures.published(
    list(table4.rows("paper")), x_of, lambda labels: labels["data"] == "books"
  )
  panels = [("the paper: 125M, Books", books)]
  ours = [(group.title, figures.points(group, x_of)) for group in found]
  panels += [(title, points) for title, points in ours if sum(map(len, points.values())) > 1]
  return {"table4": figures.lines(panels, "Perplexity by context", "T of training and test")}


def build(results: pathlib.Path) -> page.Page:
  """The page of Table 4."""
  return language.build(
    "table4",
    "Table 4: perplexity by training context",
    language.read(results, "table4"),
    notes=notes,
    figures=plot,
    more=positions,
  )

"""Pages of models that are scored on several tasks: Tables 1 and 3."""

import pathlib
import statistics
from collections.abc import Sequence

from experiments.tables import language, page


def build(
  name: str, title: str, columns: Sequence[str], results: pathlib.Path, skip: int = 0
) -> page.Page:
  """The page of a table with a number for each of `columns`; their mean leaves the first ones out.

  Args:
    name: of the table.
    title: the page's heading.
    columns: names in a line's `scores`, in the paper's order.
    results: folder of the lines.
    skip: columns that the mean leaves out.
  """
  shown = [column.replace("niah_single_", "S-NIAH-") for column in columns]
  model = lambda row: language.NAMES[row.labels["model"]]
  mean = lambda values: f"{statistics.fmean(values[skip:]):.2f}"

  def published(rows):
    body = [[model(r), *(f"{x:.2f}" for x in r.published), mean(r.published)] for r in rows]
    return page.table(body, ["paper", *shown, "average"])

  def ours(group):
    body = []
    for row in group.rows:
      lines = group.of(row.labels)
      if not group.values(row.labels):
        body.append([model(row), group.cell(row.labels), *[""] * len(columns)])
        continue
      by_seed = [[line["scores"][column] for column in columns] for line in lines]
      cells = [page.spread(values) for values in zip(*by_seed)]
      body.append([model(row), *cells, page.spread(float(mean(values)) for values in by_seed)])
    return page.table(body, ["scores", *shown, "average"])

  lines = language.read(results, name)
  return language.build(name, title, lines, published=published, more=ours)

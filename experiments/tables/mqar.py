"""Multi-query associative recall, which the paper does not report: the studies, and a figure."""

import pathlib

from experiments import study
from experiments.tables import figures, page
from experiments.tables import lines as lines_lib

FIELDS = ("labels", "seed", "peak_lr", "accuracy", "onset", "floats_of_state", "revision")


def build(results: pathlib.Path) -> page.Page:
  """The page of the studies that have a run, and the curves of recall by size of the state."""
  parts, shown, names = ["# Recall"], {}, []
  for path in sorted((results / "study").glob("*.jsonl")):
    name, lines = path.stem, lines_lib.read(path, FIELDS)
    module = study.get(name)
    heading = module.__doc__.splitlines()[0]
    parts += [f"## {heading}", study.report(module, name, lines).strip("\n")]
    cells = [labels for labels, _ in module.cells()]
    have = [labels for labels in cells if lines_lib.select(lines, {"labels": labels})]
    names.append(f"{name}: {len(have)} of {len(cells)} settings")
    if name == "mqar_mixers":
      shown["mqar"] = curves(lines, cells)
  status = "; ".join(names) or page.NOT_RUN
  return page.Page("mqar", "\n\n".join(parts) + "\n", shown, status)


def curves(lines, cells):
  """Accuracy by size of the state, a panel for each number of pairs, a line for each mixer."""
  panels: dict[int, dict[str, list[figures.Point]]] = {}
  for labels in cells:
    if not (of := lines_lib.select(lines, {"labels": labels})):
      continue
    of = study.best_rate(of)
    values = [line["accuracy"] or 0.0 for line in of]
    point = figures.Point(
      of[0]["floats_of_state"], sum(values) / len(values), min(values), max(values)
    )
    panel = panels.setdefault(labels["pairs"], {})
    panel.setdefault(labels["mixer"], []).append(point)
  shown = [(f"{pairs} pairs", models) for pairs, models in sorted(panels.items())]
  return figures.lines(
    shown,
    "Recall by size of the state",
    "floats that a row carries",
    "held-out accuracy",
    ticks=False,
  )

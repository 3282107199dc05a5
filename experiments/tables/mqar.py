"""Multi-query associative recall, which the paper does not report: the studies and their curves."""

import pathlib

from matplotlib.figure import Figure

from experiments import study
from experiments.tables import figures, learning, page, solutions
from experiments.tables import lines as lines_lib

SOLUTIONS = """\
Where runs of Trellis ended, those of stale chunks left out: models, learning rates and seeds
together, least to most, by whether the step of the last layer is large. Step, keys, binding and
higher-order path are those of that layer (experiments/traces.py)."""
FIELDS = ("labels", "seed", "peak_lr", "accuracy", "onset", "floats_of_state", "revision")


def build(results: pathlib.Path) -> page.Page:
  """The page of the studies that have a run, and the curves of those over numbers of pairs."""
  parts, shown, names = ["# Recall"], {}, []
  for path in sorted((results / "study").glob("*.jsonl")):
    name, lines = path.stem, lines_lib.read(path, FIELDS)
    module = study.get(name)
    heading = module.__doc__.splitlines()[0]
    parts += [f"## {heading}", study.report(module, name, lines).strip("\n")]
    cells = [labels for labels, _ in module.cells()]
    have = [labels for labels in cells if lines_lib.select(lines, {"labels": labels})]
    names.append(f"{name}: {len(have)} of {len(cells)} settings")
    if have and "pairs" in cells[0]:
      shown[name] = curves(heading, lines, have)
    if have and {"pairs", "n"} <= cells[0].keys():
      shown[f"{name}_steps"] = learning.grid(heading, lines, have, "pairs", "n")
      if figure := solutions.scatter(f"Where Trellis ended. {heading}", lines, have):
        shown[f"{name}_solutions"] = figure
        parts += [SOLUTIONS, solutions.table(lines, have)]
    if have and hasattr(module, "TRACES"):
      shown[name] = learning.curves(heading, lines, have, module.TRACES)
  status = "; ".join(names) or page.NOT_RUN
  return page.Page("mqar", "\n\n".join(parts) + "\n", shown, status)


def curves(heading: str, lines: list[lines_lib.Line], cells: list[dict]) -> Figure:
  """Accuracy by size, a panel for each number of pairs, a line for each model.

  The size is the label `n` where there is one, else what a row carries from token to token.
  """
  panels: dict[int, dict[str, list[figures.Point]]] = {}
  for labels in cells:
    of = study.best_rate(lines_lib.select(lines, {"labels": labels}))
    values = [line["accuracy"] or 0.0 for line in of]  # of a lost replica 0, as in the table
    size = labels.get("n", of[0]["floats_of_state"])
    point = figures.Point.of(size, values)
    model = next(iter(labels.values()))
    panels.setdefault(labels["pairs"], {}).setdefault(model, []).append(point)
  shown = [(f"{pairs} pairs", models) for pairs, models in sorted(panels.items())]
  by_n = "n" in cells[0]
  xlabel = "n" if by_n else "floats that a row carries"
  return figures.lines(shown, heading, xlabel, "held-out accuracy", ticks=by_n)

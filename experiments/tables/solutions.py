"""Which of two solutions each run of a study ended in, by its last layer's step and keys.

Step, rank, binding and the higher-order share are those of the last layer at the end of a run,
means over a batch (experiments/traces.py).
"""

from matplotlib.figure import Figure

from experiments import plots
from experiments.tables import lines as lines_lib
from experiments.tables import page

MARKERS = "os^Dv"
LARGE = 0.8  # a step; between 2/3 and 0.85 no run has ended


def is_shown(line: lines_lib.Line) -> bool:
  """Whether a line is of Trellis with traces, and not of stale chunks, whose steps are 1 / C."""
  if not line.get("traces"):
    return False
  knobs = line["settings"]["model"]["trellis"]
  return knobs["curvature"] > 0 or knobs["chunk_size"] == 1


def kept(lines: list[lines_lib.Line], cells: list[dict]) -> list[lines_lib.Line]:
  """The lines of `cells`, labels of settings, that `is_shown` takes."""
  of = (lines_lib.select(lines, {"labels": labels}) for labels in cells)
  return [line for found in of for line in found if is_shown(line)]


def at(lines: list[lines_lib.Line], n: int, pairs: int) -> list[lines_lib.Line]:
  """The lines of one size and number of pairs."""
  return [line for line in lines if (line["labels"]["n"], line["labels"]["pairs"]) == (n, pairs)]


def last(line: lines_lib.Line, name: str) -> float:
  """A trace of the last layer at the end of a run."""
  return line["traces"][name][-1][-1]


def rank(line: lines_lib.Line) -> float:
  """The effective rank of the keys over their width."""
  return last(line, "rank_key") / line["settings"]["model"]["trellis"]["head_dim"]


def table(lines: list[lines_lib.Line], cells: list[dict]) -> str:
  """Both solutions of each setting, least to most over runs; "" where no run has traces."""
  have = kept(lines, cells)
  body = []
  places = sorted({(line["labels"]["n"], line["labels"]["pairs"]) for line in have})
  for n, pairs in places:
    for large in (False, True):
      of = [line for line in at(have, n, pairs) if (last(line, "step_size") > LARGE) == large]
      spans = (
        [last(line, "step_size") for line in of],
        [line["accuracy"] or 0.0 for line in of],
        [rank(line) for line in of],
        [last(line, "binding") for line in of],
        [last(line, "higher_order") for line in of],
      )
      if of:
        body.append([n, pairs, len(of), *(f"{min(x):.2f} to {max(x):.2f}" for x in spans)])
  columns = ["n", "pairs", "runs", "step", "accuracy", "rank of keys, of their width", "binding"]
  return page.table(body, [*columns, "higher order"]) if body else ""


def scatter(heading: str, lines: list[lines_lib.Line], cells: list[dict]) -> Figure | None:
  """A dot for each run at its end, a panel for each size, None where no run has traces.

  Args:
    heading: the title.
    lines: of a study over `pairs` and `n`.
    cells: the labels of the settings to show.
  """
  have = kept(lines, cells)
  if not have:
    return None
  values = lambda name: sorted({line["labels"][name] for line in have})
  with plots.style():
    figure = Figure(figsize=(4.2 * len(values("n")) + 1.2, 4.2))
    axes = figure.subplots(1, len(values("n")), squeeze=False)[0]
    for ax, n in zip(axes, values("n")):
      for pairs, marker in zip(values("pairs"), MARKERS):
        of = at(have, n, pairs)
        shown = ax.scatter(
          [last(line, "step_size") for line in of],
          [line["accuracy"] or 0.0 for line in of],
          c=[rank(line) for line in of],
          marker=marker,
          vmin=0,
          vmax=1,
          edgecolor="black",
          linewidth=0.4,
        )
      ax.set(title=f"n {n}", xlabel="step g of the last layer", xlim=(0, 1.03))
    for pairs, marker in zip(values("pairs"), MARKERS):
      axes[0].scatter([], [], marker=marker, color="grey", label=f"{pairs} pairs")
    figure.legend(loc="outside lower center", ncols=len(values("pairs")))
    axes[0].set_ylabel("held-out accuracy")
    figure.colorbar(shown, ax=list(axes), label="rank of the keys, of their width")
    figure.suptitle(heading)
  return figure

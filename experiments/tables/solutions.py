"""Which solution each run of a study ended in: accuracy by the step and the rank of the keys."""

from matplotlib.figure import Figure

from experiments import plots
from experiments.tables import lines as lines_lib

MARKERS = "os^Dv"


def exact(line: lines_lib.Line) -> bool:
  """Whether a line is of Trellis with traces, and not of stale chunks, whose steps are 1 / C."""
  if not line.get("traces"):
    return False
  knobs = line["settings"]["model"]["trellis"]
  return knobs["curvature"] > 0 or knobs["chunk_size"] == 1


def scatter(heading: str, lines: list[lines_lib.Line], cells: list[dict]) -> Figure | None:
  """A dot for each run at its end, a panel for each size, None where no run has traces.

  Step and rank are those of the last layer, means over a batch (experiments/traces.py).

  Args:
    heading: the title.
    lines: of a study over `pairs` and `n`.
    cells: the labels of the settings to show.
  """
  have = [line for labels in cells for line in lines_lib.select(lines, {"labels": labels})]
  have = [line for line in have if exact(line)]
  if not have:
    return None
  values = lambda name: sorted({line["labels"][name] for line in have})
  last = lambda line, name: line["traces"][name][-1][-1]
  share = lambda line: last(line, "rank_key") / line["settings"]["model"]["trellis"]["head_dim"]
  with plots.style():
    figure = Figure(figsize=(4.2 * len(values("n")) + 1.2, 4.2))
    axes = figure.subplots(1, len(values("n")), squeeze=False)[0]
    for ax, n in zip(axes, values("n")):
      for pairs, marker in zip(values("pairs"), MARKERS):
        dots = lines_lib.select((x["labels"] | {"line": x} for x in have), {"n": n, "pairs": pairs})
        of = [dot["line"] for dot in dots]
        shown = ax.scatter(
          [last(line, "step_size") for line in of],
          [line["accuracy"] or 0.0 for line in of],
          c=[share(line) for line in of],
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

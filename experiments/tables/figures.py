"""Figures in the shape of the paper's: a line for a model, a panel for a size."""

import collections
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments import plots
from experiments.configs.paper import base
from experiments.tables.language import NAMES, Group

# Okabe and Ito's colours, a marker each; Trellis is the vermillion one throughout.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#999933", "#D55E00")
MARKERS = "osDvP^X*"
STYLES = dict(zip(base.NAMES, zip(COLOURS, MARKERS)))
# The mixers that the paper does not compare.
OTHERS = ("abc", "gla", "hgrn2", "lattice", "retnet", "titans", "ttt_mlp")
PALE = ("#332288", "#88CCEE", "#44AA99", "#117733", "#882255", "#AA4499", "#DDCC77")
STYLES |= dict(zip(OTHERS, zip(PALE, "<>pHd+x")))
STYLES["trellis_m32"] = (plots.VERMILLION, "h")
STYLES["trellis_m32_exact"] = (plots.VERMILLION, "8")
STYLES["trellis_wide"] = (plots.VERMILLION, "D")
STYLES["trellis_wide_exact"] = (plots.VERMILLION, "d")
STYLES["trellis_wide_spread"] = (plots.VERMILLION, "p")
STYLES["no_forget"] = (plots.VERMILLION, "1")
DASHES, AGAIN = ("-", "--", ":", "-."), "os^v"  # of models that share a colour
FAR = 1.6  # times the least of a panel, from which a row is an arrow at the edge
FAR_LINES = 2.0  # the same of a point of a line


class Point(NamedTuple):
  """A point of a line: where, the mean, and the least and most over seeds."""

  x: float
  mean: float
  least: float
  most: float

  @classmethod
  def of(cls, x: float, values: Sequence[float]) -> "Point":
    """The point of the values of some seeds."""
    return cls(x, statistics.fmean(values), min(values), max(values))


Panel = tuple[str, Mapping[str, Sequence[Point]]]  # title, points by model


def lines(
  panels: Sequence[Panel], title: str, xlabel: str, ylabel: str = "perplexity", ticks: bool = True
) -> Figure:
  """A panel beside the other, a line for each model over a logarithmic axis.

  A perplexity that is far behind, by a factor FAR_LINES of the least, is a mark above the others
  with its number.

  Args:
    panels: what to show.
    title, xlabel, ylabel: texts.
    ticks: whether the axis has a tick for each place where points are.
  """
  with plots.style():
    figure = Figure(figsize=(5 * len(panels), 4.6))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    styles = _styles(panels)
    for ax, (name, models) in zip(axes, panels):
      have = {model: points for model, points in models.items() if points}
      near, far = _apart(have) if ylabel == "perplexity" else (have, [])
      for model, points in near.items():
        x, mean, least, most = np.array(points, float).reshape(-1, 4).T
        bars = np.stack([mean - least, most - mean])
        ax.errorbar(
          x,
          mean,
          bars if bars.any() else None,
          label=NAMES.get(model, model),
          markersize=5,
          capsize=2,
          **styles[model],
        )
      stacked = collections.Counter()
      for model, point in far:  # the nearest of them lowest
        y, look = 1.04 + 0.06 * stacked[point.x], styles[model] | {"linestyle": ""}
        stacked[point.x] += 1
        ax.plot(point.x, y, transform=ax.get_xaxis_transform(), clip_on=False, **look)
        at = dict(xytext=(6, 0), textcoords="offset points", va="center", fontsize="small")
        ax.annotate(f"{point.mean:.1f}", (point.x, y), xycoords=ax.get_xaxis_transform(), **at)
      ax.set(xlabel=xlabel, ylabel=ylabel)
      ax.set_title(name, pad=6 + 16 * max(stacked.values(), default=0))
      ax.set_xscale("log")
      if ticks:
        at = sorted({p.x for points in models.values() for p in points})
        ax.set_xticks(at, map(short, at))
        ax.xaxis.set_minor_locator(NullLocator())
    named = {k: h for ax in axes for h, k in zip(*ax.get_legend_handles_labels())}
    columns = 4 if len(panels) > 1 else 2
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)
    figure.suptitle(textwrap.fill(title, 54 * len(panels)))
  return figure


def _apart(models: Mapping[str, Sequence[Point]]):
  """(points by model without those that are far behind, (model, point) of those, least first)."""
  bound = FAR_LINES * min((p.mean for points in models.values() for p in points), default=0.0)
  near = {model: [p for p in points if p.mean <= bound] for model, points in models.items()}
  far = [(model, p) for model, points in models.items() for p in points if p.mean > bound]
  return near, sorted(far, key=lambda found: found[1].mean)


def _styles(panels: Sequence[Panel]) -> dict[str, dict]:
  """The style of each model that is shown: of those of one colour the first is solid."""
  found, used = {}, {}
  for model in dict.fromkeys(m for _, models in panels for m, points in models.items() if points):
    colour, marker = STYLES.get(model) or STYLES.get(model.split()[0], (plots.GREY, "."))
    nth = used[colour] = used.get(colour, -1) + 1
    nth = max(nth, int(model in ("no_forget", *OTHERS)))
    found[model] = dict(
      color=colour,
      marker=marker if nth < 2 else AGAIN[(nth + nth // len(DASHES)) % len(AGAIN)],
      markerfacecolor="white" if nth else colour,
      linestyle=DASHES[nth % len(DASHES)],
    )
  return found


def short(x: float) -> str:
  """ "512", "8k"."""
  return f"{x / 1024:g}k" if x >= 1024 and x % 1024 == 0 else f"{x:g}"


def dots(
  panels: Sequence[tuple[str, Mapping[str, Point]]],
  title: str,
  xlabel: str,
  ours: str = "trellis",
) -> Figure:
  """A panel beside the other, a row for each name with a point in it, in the same order.

  A row that is far behind, by a factor FAR of the least, is an arrow at the edge with its number.
  """
  names = list(dict.fromkeys(name for _, points in panels for name in points))[::-1]
  with plots.style():
    figure = Figure(figsize=(2.2 + 3.6 * len(panels), 0.9 + 0.32 * len(names)))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (name, points) in zip(axes, panels):
      bound = FAR * min((point.mean for point in points.values()), default=0.0)
      edge = max((point.most for point in points.values() if point.mean <= bound), default=0.0)
      for row, (_, mean, least, most) in points.items():
        y, colour = names.index(row), plots.VERMILLION if row == ours else plots.BLUE
        if mean > bound:
          ax.plot(edge, y, color=colour, marker=">")
          ax.annotate(f"{mean:.2f} ", (edge, y), ha="right", va="center", fontsize="small")
          continue
        ax.errorbar(
          mean,
          y,
          xerr=[[mean - least], [most - mean]] if most > least else None,
          color=colour,
          marker="o",
          capsize=2,
        )
      if ours in points:
        ax.axvline(points[ours].mean, color=plots.GREY, linestyle=":", linewidth=1.2)
      ax.set(title=name, xlabel=xlabel)
    axes[0].set_yticks(range(len(names)), [NAMES.get(n, n) for n in names])
    figure.suptitle(title)
  return figure


def points(group: Group, x_of, keep=lambda labels: True) -> dict[str, list[Point]]:
  """A group's points by model, along x = x_of(row's labels, its first line)."""
  found: dict[str, list[Point]] = {}
  for row in group.rows:
    values = group.values(row.labels)
    if values and keep(row.labels):
      x = x_of(row.labels, group.of(row.labels)[0])
      point = Point.of(x, values)
      found.setdefault(row.labels["model"], []).append(point)
  return found


def published(rows: Sequence[base.Row], x_of, keep=lambda labels: True) -> dict[str, list[Point]]:
  """The paper's points by model."""
  found: dict[str, list[Point]] = {}
  for row in rows:
    if row.published is not None and keep(row.labels):
      point = Point(x_of(row.labels), *3 * (row.published,))
      found.setdefault(row.labels["model"], []).append(point)
  return found

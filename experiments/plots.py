"""The figures of a report: loss, perplexity by position, and what happens inside the memories.

Each function takes plain arrays and returns a figure; `save` writes it as a PNG. Colours are those
of Okabe and Ito, layers go along cividis, signed values along PuOr: all three keep their meaning
for colour-blind eyes.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, ScalarFormatter

BLUE, SKY, VERMILLION, GREY = "#0072B2", "#56B4E9", "#D55E00", "#666666"
STYLE = {
  "axes.axisbelow": True,
  "axes.grid": True,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlesize": 11,
  "figure.constrained_layout.use": True,
  "figure.dpi": 130,
  "figure.labelsize": 10.5,
  "figure.titlesize": 12,
  "font.size": 10.5,
  "grid.alpha": 0.3,
  "legend.fontsize": 9.5,
  "legend.frameon": False,
  "lines.linewidth": 1.8,
}
MAX_PANELS = 8  # layers that a figure with a panel each shows, evenly spaced from first to last
SNAPSHOTS = 5  # of the memories, in a figure

Arrays = Mapping[str, np.ndarray]
Layers = Mapping[int, Arrays]  # by the number of the layer, counted from 1, see trellis_jax.inspect


@contextlib.contextmanager
def style() -> Iterator[None]:
  """Within it, figures look like a report's."""
  with mpl.rc_context(STYLE):
    yield


def save(figure: Figure, path: pathlib.Path) -> None:
  """Writes a PNG; a kill in the middle leaves what was there before."""
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  figure.savefig(partial, format="png", metadata={"Software": None})  # same pixels, same bytes
  os.replace(partial, path)


def loss(records: Sequence[Mapping[str, float]], levels: Mapping[str, float]) -> Figure:
  """Training and validation loss over the steps.

  Args:
    records: lines of metrics.jsonl.
    levels: losses to compare with by their names, nats per token.
  """
  figure = Figure(figsize=(8, 4.5))
  ax = figure.subplots()
  of = lambda name: np.array([(r["step"], r[name]) for r in records if name in r]).reshape(-1, 2).T
  steps, train = of("train/loss")
  many = len(steps) > 50
  ax.plot(steps, train, color=BLUE, alpha=0.35 if many else 1, label="" if many else "training")
  if many:
    ax.plot(steps, moving_average(train, len(steps) // 25), color=BLUE, label="training, smoothed")
  steps, held_out = of("eval/loss")
  if len(steps):
    ax.plot(steps, held_out, color=VERMILLION, marker="o", markersize=4, label="validation")
  for (name, level), dashes in zip(levels.items(), ("--", ":")):
    ax.axhline(level, color=GREY, linestyle=dashes, linewidth=1.4, label=name)
  ax.set(title="Loss", xlabel="step (updates)", ylabel="loss (nats per token)")
  ax.xaxis.set_major_locator(MaxNLocator(integer=True))
  ax.legend()
  return figure


def perplexity_by_position(
  ranges: Sequence[tuple[int, int]],
  model: Sequence[float],
  bigram: Sequence[float],
  bigram_level: float,
) -> Figure:
  """Perplexity by position in the visible context.

  Args:
    ranges: first and last position of each bucket.
    model: perplexity of the model in each bucket, NaN where there is no token.
    bigram: perplexity of the token bigram on the same tokens.
    bigram_level: perplexity of the token bigram on all of them.
  """
  figure = Figure(figsize=(8, 4.5))
  ax = figure.subplots()
  at = np.arange(len(ranges))
  ax.axhline(
    bigram_level, color=GREY, linestyle="--", linewidth=1.2, label="token bigram, all tokens"
  )
  ax.plot(at, bigram, color=GREY, marker="s", markersize=5, label="token bigram, same tokens")
  ax.plot(at, model, color=BLUE, marker="o", label="model")
  for x, y in zip(at, model):
    if math.isfinite(y):
      text = f"{y:.3g}" if y < 1000 else f"{y:,.0f}"
      ax.annotate(text, (x, y), (0, 7), textcoords="offset points", ha="center", color=BLUE)
  ax.set_xticks(at, [f"{first}–{last}" if last > first else f"{first}" for first, last in ranges])
  ax.set(
    title="Held-out perplexity by position",
    xlabel="tokens of the same document seen before, in the same row",
    ylabel="perplexity per token",
  )
  plain_log_axis(ax.yaxis, [*model, *bigram, bigram_level])
  ax.margins(y=0.15)
  ax.legend()
  return figure


def inner_loss(layers: Layers, live: np.ndarray) -> Figure:
  """Inner loss around each token's own write, a panel per layer.

  Args:
    layers: traces with loss_{before,after}_{k,v} [B, T, H].
    live: bool [B, T], where there is a token.
  """
  shown = evenly(list(layers), MAX_PANELS)
  figure, axes = panels(len(shown), "Inner loss of each token, before and after its own write")
  at, masks = log_bins(live)
  # The two passes are often close: the wide line shows beneath the narrow one.
  lines = [
    Line2D([], [], color=color, linewidth=width, linestyle=dashes, label=f"{w}, {when}")
    for w, color, width in (("keys", SKY, 3.0), ("values", VERMILLION, 1.2))
    for when, dashes in (("before", "-"), ("after", "--"))
  ]
  for ax, number in zip(axes, shown):
    ax.set_title(f"layer {number}")
    for line in lines:
      w, when = line.get_label().split(", ")
      y = binned(layers[number][f"loss_{when}_{w[0]}"], masks)
      ax.plot(
        at, y, **{k: getattr(line, f"get_{k}")() for k in ("color", "linestyle", "linewidth")}
      )
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(ScalarFormatter())
  figure.supylabel(f"½ |φ(S w) − α|², mean over heads and {len(live)} documents")
  figure.legend(handles=lines, loc="outside lower center", ncols=4)
  return figure


def gates(layers: Layers, live: np.ndarray) -> Figure:
  """Gates, and norm and effective rank of the memories, over positions, a line per layer.

  Args:
    layers: traces with forget_gate, step_size [B, T, H], norm_{k,v} and rank_{k,v} [B, N, H].
    live: bool [B, T], where there is a token; N divides T.
  """
  figure, axes = panels(6, f"Gates and memories, mean over heads and {len(live)} documents")
  length = live.shape[1]
  titles = {
    "forget_gate": ("forget gate β", "kept per token"),
    "norm_k": ("key memory's norm", "Frobenius norm"),
    "rank_k": ("key memory's effective rank", "directions"),
    "step_size": ("step size γ", "inner learning rate"),
    "norm_v": ("value memory's norm", "Frobenius norm"),
    "rank_v": ("value memory's effective rank", "directions"),
  }
  colors = mpl.colormaps["cividis"](np.linspace(0, 0.92, len(layers)))
  for ax, (name, (title, unit)) in zip(axes, titles.items()):
    for (number, trace), color in zip(layers.items(), colors):
      values = trace[name]
      every = length // values.shape[1]
      ends = np.arange(every, length + 1, every)
      mean = masked_mean(values, live[:, ends - 1])
      window = max(1, len(ends) // 16) if every == 1 else 1
      ax.plot(ends, moving_average(mean, window), color=color, linewidth=1.5, label=f"{number}")
    ax.set(title=title, ylabel=unit)
    ax.ticklabel_format(useOffset=False)
  handles = axes[0].get_lines()
  keep = evenly(range(len(handles)), 12)
  figure.legend(
    handles=[handles[i] for i in keep], title="layer", loc="outside right center", handlelength=1.2
  )
  return figure


def memories(trace: Arrays, layer: int, head: int) -> Figure:
  """Both memories of one head as heat maps, at several positions of the first row.

  Args:
    trace: of a layer, memory_k [B, N, H, M, D], memory_v [B, N, H, M, V], loss_before_k [B, T, H].
    layer: its number, counted from 1.
    head: the head's number, counted from 1.
  """
  snapshots, length = trace["memory_k"].shape[1], trace["loss_before_k"].shape[1]
  every = length // snapshots
  chosen = sorted({round(x) for x in np.geomspace(1, snapshots, min(SNAPSHOTS, snapshots))})
  figure = Figure(figsize=(max(8, 2.1 * len(chosen) + 1.7), 5.5))
  axes = figure.subplots(2, len(chosen), squeeze=False)
  for row, name, width in zip(axes, "kv", ("key features", "value features")):
    shots = trace[f"memory_{name}"][0, :, head - 1]
    limit = max(float(np.quantile(np.abs(shots), 0.998)), 1e-6)
    for ax, n in zip(row, chosen):
      image = ax.imshow(
        shots[n - 1], cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
      )
      ax.grid(False)
      ax.spines[:].set_visible(True)
      ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
      ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
      ax.set_xlabel(width)
      ax.tick_params(labelleft=ax is row[0])
    row[0].set_ylabel(f"slots of S$_{name}$")
    figure.colorbar(image, ax=list(row), label="entry", pad=0.015)
  for ax, n in zip(axes[0], chosen):
    ax.set_title(f"after {n * every} token{'s' * (n * every > 1)}")
  figure.suptitle(
    f"The memories of layer {layer}, head {head}, along the longest held-out document"
  )
  return figure


def most_used(layers: Layers) -> tuple[int, int]:
  """The layer and head, from 1, whose memories have the largest effective rank in the end.

  Of the first row: rank of the key memory times that of the value memory.
  """
  ranks = {i: trace["rank_k"][0, -1] * trace["rank_v"][0, -1] for i, trace in layers.items()}
  layer = max(ranks, key=lambda i: ranks[i].max())
  return layer, int(ranks[layer].argmax()) + 1


def panels(count: int, title: str):
  """A figure with a grid of `count` panels over the tokens read, and the panels."""
  columns = 2 if count in (2, 4) else min(count, 3) if count <= 6 else 4
  rows = -(-count // columns)
  figure = Figure(figsize=(max(6, 3.4 * columns + 0.8), 2.7 * rows + 1.1))
  figure.suptitle(title)
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for i, ax in enumerate(axes):
    if i >= count:
      ax.remove()
    elif i + columns >= count:
      ax.set_xlabel("tokens read")
  return figure, axes[:count]


def evenly(items: Sequence, most: int) -> list:
  """At most `most` of the items, evenly spaced, with the first and the last."""
  at = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
  return [items[i] for i in at]


def log_bins(live: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
  """Bins of a third of an octave: mean number of tokens read, and mask [B, T] of each bin."""
  read = np.arange(1, live.shape[1] + 1)
  bin_of = np.ceil(3 * np.log2(read)).astype(int)  # powers of two end their bins
  bins = [bin_of == b for b in np.unique(bin_of)]
  return np.array([read[b].mean() for b in bins]), [live & b for b in bins]


def binned(values: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
  """Mean of values [B, T, H] over each mask [B, T] and the heads; NaN for an empty one."""
  return np.array([values[m].mean() if m.any() else np.nan for m in masks])


def masked_mean(values: np.ndarray, live: np.ndarray) -> np.ndarray:
  """Mean of values [B, N, H] over heads and the live rows [B, N]; NaN where no row lives."""
  count = live.sum(0)
  total = np.where(live, values.mean(-1), 0).sum(0)
  return np.where(count, total / np.maximum(count, 1), np.nan)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
  """Centred mean over `window` values, over fewer at the ends."""
  kernel = np.ones(max(1, window) | 1)  # odd, so that it has a centre
  pad = len(kernel) // 2
  total = np.convolve(values, kernel)[pad : pad + len(values)]
  return total / np.convolve(np.ones(len(values)), kernel)[pad : pad + len(values)]


def plain_log_axis(axis, values: Sequence[float]) -> None:
  """A log axis with ticks at round numbers, written out."""
  axis.axes.set_yscale("log")
  finite = [v for v in values if math.isfinite(v)]
  low, high = min(finite, default=1) / 1.3, max(finite, default=10) * 1.3
  densest = ((4, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)), (30, (1, 2, 3, 5, 7)), (300, (1, 2, 5)))
  steps = next((steps for ratio, steps in densest if high / low < ratio), (1,))
  ticks = [m * 10.0**e for e in range(-1, 12) for m in steps]
  axis.set_ticks([t for t in ticks if low <= t <= high])
  axis.set_ticks([], minor=True)
  axis.set_major_formatter(ScalarFormatter())

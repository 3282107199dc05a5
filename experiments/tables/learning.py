"""How a study's models learn: accuracy over steps, and beside it what their memories do."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments import plots, study
from experiments.tables import figures
from experiments.tables import lines as lines_lib


def curves(
  heading: str, lines: list[lines_lib.Line], cells: list[dict], names: Sequence[str]
) -> Figure:
  """A line for each seed, a colour for each setting.

  A trace is that of the layer in which it ends highest: seeds differ in which layer does the work.

  Args:
    heading: the title.
    lines: of the study.
    cells: the labels of the settings to show.
    names: of the traces (experiments/traces.py) that get a panel.
  """
  same = {k for k in cells[0] if len({str(labels[k]) for labels in cells}) == 1}
  with plots.style():
    figure = Figure(figsize=(3.6 * (len(names) + 1), 3.6))
    axes = figure.subplots(1, len(names) + 1)
    for labels, colour in zip(cells, figures.COLOURS[::-1]):
      shown = " ".join(f"{k}={v}" for k, v in labels.items() if k not in same)
      for line in lines_lib.select(lines, {"labels": labels}):
        kw = dict(color=colour, linewidth=1.2, label=shown)
        axes[0].plot(line["eval_steps"], line["eval_accuracy"], **kw)
        for ax, name in zip(axes[1:], names):
          by_layer = np.asarray(line["traces"][name])
          ax.plot(line["eval_steps"], by_layer[:, by_layer[-1].argmax()], **kw)
    for ax, name in zip(axes, ("held-out accuracy", *names)):
      ax.set(title=name.replace("_", " "), xlabel="step")
    named = dict(zip(*axes[0].get_legend_handles_labels()[::-1]))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named))
    figure.suptitle(heading)
  return figure


def grid(
  heading: str, lines: list[lines_lib.Line], cells: list[dict], down: str, along: str
) -> Figure:
  """Accuracy of the training batches over the steps: a panel for each two values, means over seeds.

  A replica answers a batch before it learns from it. Shaded is from the least to the most of the
  seeds, at the learning rate with the best held-out accuracy.

  Args:
    heading: the title.
    lines: of the study.
    cells: the labels of the settings to show; the first label is the model.
    down, along: the labels of the rows of panels, and of their columns.
  """
  values = lambda name: sorted({labels[name] for labels in cells})
  names = list(dict.fromkeys(next(iter(labels.values())) for labels in cells))
  with plots.style():
    figure = Figure(figsize=(3.2 * len(values(along)), 2.4 * len(values(down)) + 0.6))
    axes = figure.subplots(
      len(values(down)), len(values(along)), squeeze=False, sharex=True, sharey=True
    )
    at = {(d, a): ax for d, row in zip(values(down), axes) for a, ax in zip(values(along), row)}
    for labels in cells:
      found = study.best_rate(lines_lib.select(lines, {"labels": labels}))
      kept = [line for line in found if line["lost"] is None]
      if not kept:
        continue
      name, steps = next(iter(labels.values())), np.asarray(kept[0]["steps"])
      y = np.stack([_smooth(line["train_accuracy"]) for line in kept])
      again, nth = divmod(names.index(name), len(figures.COLOURS))
      colour, dash = figures.COLOURS[nth], figures.DASHES[again % len(figures.DASHES)]
      ax = at[labels[down], labels[along]]
      ax.plot(steps, y.mean(axis=0), dash, color=colour, linewidth=1.4, label=name)
      ax.fill_between(steps, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    for (d, a), ax in at.items():
      ax.set(title=f"{d} {down}, {along} {a}", ylim=(0, 1.02))
    for ax in axes[-1]:
      ax.set_xlabel("step")
    for ax in axes[:, 0]:
      ax.set_ylabel("accuracy")
    named = {k: h for ax in at.values() for h, k in zip(*ax.get_legend_handles_labels())}
    order = [name for name in names if name in named]
    figure.legend([named[n] for n in order], order, loc="outside lower center", ncols=3)
    figure.suptitle(heading)
  return figure


def _smooth(values: Sequence[float], width: int = 5) -> np.ndarray:
  """Means of `width` logged batches, of fewer at the ends: a batch has few questions."""
  ones = np.ones(min(width, len(values)))
  return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")

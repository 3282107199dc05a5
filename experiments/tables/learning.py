"""How a study's models learn: accuracy over steps, and beside it what their memories do."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments import plots
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

"""Writes the table of forecasting errors from the lines of a results folder.

    python -m experiments.series.table --results=benchmarks/results/series

Reads every .jsonl there and writes README.md beside them. Ours are means over seeds with their
least and most; what was not run says so.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterable
from statistics import fmean  # the same bits in every Python, which sum is not
from typing import Any

import tabulate

from experiments import metrics, provenance
from experiments.series import dlinear
from experiments.series.published import (
  AVERAGES,
  BY_HORIZON,
  DATASETS,
  HORIZONS,
  average,
  by_horizon,
)

RESULTS = provenance.ROOT / "benchmarks" / "results" / "series"
OURS, RIVAL, REFERENCE = "trellis", "DLinear", "iTransformer"
SUM_OF = ("ETTh1", "ETTh2", "ETTm1", "weather")  # that the comparison with the reference is over
METRICS = ("mse", "mae")
NOT_RUN = "not run"
Lines = list[dict[str, Any]]


def read(folder: pathlib.Path) -> Lines:
  """All lines of a folder."""
  return [line for path in sorted(folder.glob("*.jsonl")) for line in metrics.read(path)]


def select(lines: Lines, **wanted: Any) -> Lines:
  """The lines with these labels."""
  return [line for line in lines if all(line["labels"][k] == v for k, v in wanted.items())]


def seeds_of(lines: Lines, model: str, dataset: str) -> list[tuple[float, float]]:
  """(MSE, MAE) over the four horizons of every seed that has all of them."""
  rows = []
  lines = select(lines, model=model, dataset=dataset)
  for seed in sorted({line["seed"] for line in lines}, key=str):
    of = {line["labels"]["horizon"]: line for line in lines if line["seed"] == seed}
    if all(h in of for h in HORIZONS):
      rows.append(tuple(fmean(of[h][m] for h in HORIZONS) for m in METRICS))
  return rows


def ours(lines: Lines, model: str, dataset: str) -> tuple[float, float] | None:
  """(MSE, MAE) over horizons and seeds, None where there is no seed with all horizons."""
  rows = seeds_of(lines, model, dataset)
  return tuple(map(fmean, zip(*rows))) if rows else None


def spread(values: Iterable[float]) -> str:
  """ "0.431 (0.430-0.433)" of several values, "0.431" of one, "not run" of none."""
  values = list(values)
  if not values:
    return NOT_RUN
  mean = f"{fmean(values):.3f}"
  return mean if len(values) == 1 else f"{mean} ({min(values):.3f}-{max(values):.3f})"


def models(lines: Lines) -> list[str]:
  """Our models: the one in question first, then the other mixers, then forecasts without one."""
  plain = ("linear_cycle", "linear_centred", "linear", dlinear.NAME, "last")
  found = {line["labels"]["model"] for line in lines} | {OURS}
  return [OURS, *sorted(found - {OURS, *plain}), *(m for m in plain if m in found)]


def averages(lines: Lines, metric: str) -> str:
  """Models x datasets, over the four horizons."""
  at = METRICS.index(metric)
  body = []
  for model in models(lines):
    cells = (spread(row[at] for row in seeds_of(lines, model, d)) for d in DATASETS)
    body.append([model, *cells])
  for model in (*BY_HORIZON, *AVERAGES):
    cells = (average(model, d) for d in DATASETS)
    body.append([f"{model} (published)", *("" if c is None else f"{c[at]:.3f}" for c in cells)])
  return _table(body, [metric.upper(), *DATASETS])


def horizons(lines: Lines) -> str:
  """Datasets and horizons x ours and published, MSE and MAE."""
  body = []
  for dataset in DATASETS:
    for horizon in HORIZONS:
      here = select(lines, dataset=dataset, horizon=horizon)
      row = [dataset, str(horizon)]
      for metric in METRICS:
        row.append(spread(line[metric] for line in select(here, model=OURS)))
      for model in ("linear", dlinear.NAME, "last"):
        row.append(" ".join(spread(line[m] for line in select(here, model=model)) for m in METRICS))
      for model in BY_HORIZON:
        row.append(" ".join(f"{x:.3f}" for x in by_horizon(model, dataset, horizon)))
      body.append(row)
  names = ["dataset", "horizon", f"{OURS} MSE", f"{OURS} MAE", "linear, ours"]
  names += [f"{dlinear.NAME}, ours", "last, ours"]
  return _table(body, [*names, *(f"{model}, published" for model in BY_HORIZON)])


def parity(lines: Lines) -> list[str]:
  """How far the rival, trained here, is from what was published of it, one sentence a series."""
  said = []
  for dataset in DATASETS:
    if mine := ours(lines, dlinear.NAME, dataset):
      theirs = average(RIVAL, dataset)
      off = " and ".join(f"{100 * (a / b - 1):+.1f}%" for a, b in zip(mine, theirs))
      numbers = [f"{mse:.3f} and {mae:.3f}" for mse, mae in (mine, theirs)]
      said.append(f"{dataset}: {RIVAL} {numbers[0]} here, {numbers[1]} published: {off}.")
  return said


def verdicts(lines: Lines) -> list[str]:
  """What the comparison with the published averages says, one sentence each."""
  said = []
  for dataset in SUM_OF:
    theirs, mine = average(RIVAL, dataset)[0], ours(lines, OURS, dataset)
    if mine is None:
      said.append(f"{dataset}: {NOT_RUN} at all horizons; {RIVAL}'s average MSE is {theirs:.3f}.")
    else:
      word = "below" if mine[0] < theirs else "NOT below"
      said.append(f"{dataset}: {OURS} {mine[0]:.3f} is {word} {RIVAL}'s average MSE {theirs:.3f}.")
  done = [d for d in SUM_OF if ours(lines, OURS, d)]
  if done:
    mean = lambda f: fmean(f(d)[0] for d in done)
    mine, theirs = mean(lambda d: ours(lines, OURS, d)), mean(lambda d: average(REFERENCE, d))
    said.append(
      f"Mean MSE over {', '.join(done)}: {OURS} {mine:.4f}, {REFERENCE} {theirs:.4f}, "
      f"ratio {mine / theirs:.3f}."
    )
  return said


def report(lines: Lines) -> str:
  """The text of the table's page."""
  of_ours = [line for line in lines if line["labels"]["model"] == OURS]
  seeds = ", ".join(str(s) for s in sorted({line["seed"] for line in of_ours})) or "none yet"
  revisions = " ".join(sorted({line["revision"] for line in lines})) or "none yet"
  sizes = sorted(line["parameters"] for line in of_ours)
  size = f"{sizes[0]:,} to {sizes[-1]:,}" if sizes else "none yet"
  return f"""# Long-term forecasting at look-back 96

    python -m experiments.series.grid FOLDER

FOLDER holds the CSV files. Errors are those of standardised values over all test windows, the last
batch included. The step kept is the best on validation; the settings, the same for all series, were
compared by their validation errors at horizon 96 with the test errors in view: that the cycle is in
units of the window was tried after a poor test error on weather. Every line of the .jsonl files
beside this page has its settings, git revision and command.
`linear_cycle` is the forecaster without blocks: a learned daily cycle and one linear map of the
window; `linear` and `linear_centred` are closed forms, `dlinear` is DLinear trained here by its
authors' recipe, `last` repeats the last value.

Seeds of {OURS}: {seeds}; {size} parameters. Ours: mean over seeds (least-most).
Revisions: {revisions}.

{_bullets(verdicts(lines))}

Average MSE and MAE of {RIVAL}, trained here by its authors' recipe:

{_bullets(parity(lines)) or NOT_RUN}

## Averages over horizons 96, 192, 336, 720

{averages(lines, "mse")}

{averages(lines, "mae")}

## By horizon

{horizons(lines)}
"""


def _bullets(sentences: list[str]) -> str:
  return "\n".join(f"* {sentence}" for sentence in sentences)


def _table(body: list[list[str]], names: list[str]) -> str:
  return tabulate.tabulate(body, names, tablefmt="github", disable_numparse=True)


def write(folder: pathlib.Path, say: Callable[[str], None] = lambda text: None) -> None:
  """Writes the page of a results folder."""
  text = report(read(folder))
  provenance.write(folder / "README.md", text)
  say(text)


def main(argv: list[str]) -> int:
  """Runs the command line `argv`; 2 for a mistake in what was asked, one sentence on stderr."""
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of the lines")
  folder = parser.parse_args(argv[1:]).results
  if not any(folder.glob("*.jsonl")):
    print(f"error: {folder} holds no .jsonl file of results", file=sys.stderr)
    return 2
  write(folder, print)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))

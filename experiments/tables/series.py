"""Long-term forecasting, the table that the paper announces and does not print."""

import pathlib

from experiments.series import table
from experiments.tables import lines as lines_lib
from experiments.tables import page

FIELDS = ("labels", "seed", "mse", "mae", "revision", "command", "settings")


def build(results: pathlib.Path) -> page.Page:
  """The page of the series."""
  lines = [
    line
    for path in sorted((results / "series").glob("*.jsonl"))
    for line in lines_lib.read(path, FIELDS)
  ]
  have = sum(bool(table.ours(lines, table.OURS, dataset)) for dataset in table.DATASETS)
  status = f"{have} of {len(table.DATASETS)} series at all horizons"
  return page.Page("series", table.report(lines), status=status)

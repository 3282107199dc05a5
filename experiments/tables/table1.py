"""Table 1: common sense, zero-shot."""

import pathlib

from experiments.configs.paper import table1
from experiments.tables import page, scored

COLUMNS = ("lambada_perplexity", *table1.TASKS)


def build(results: pathlib.Path) -> page.Page:
  """The page of Table 1."""
  return scored.build("table1", "Table 1: common sense, zero-shot", COLUMNS, results, skip=1)

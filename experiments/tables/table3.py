"""Table 3: needles in haystacks."""

import pathlib

from experiments.configs.paper import table3
from experiments.tables import page, scored

COLUMNS = tuple(f"{kind} {length}" for kind, length in table3.CELLS)


def build(results: pathlib.Path) -> page.Page:
  """The page of Table 3."""
  return scored.build("table3", "Table 3: S-NIAH", COLUMNS, results)

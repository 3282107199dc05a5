"""Writes all tables and figures into docs/results, from the lines of finished runs alone.

    python -m experiments.tables
    python -m experiments.tables table4 --results=FOLDER --out=FOLDER

A table is a file of this folder with `build(results)`. Nothing is trained or scored here: what has
no line in benchmarks/results says that it was not run.
"""

import argparse
import importlib
import pathlib
import sys

import matplotlib as mpl

from experiments import provenance
from experiments.errors import UserError
from experiments.tables import page

TABLES = (
  *("table1", "table2", "table3", "table4", "matched"),
  *("fig2", "fig3", "readings", "mqar", "series"),
)
RESULTS = provenance.ROOT / "benchmarks" / "results"
OUT = provenance.ROOT / "docs" / "results"
INDEX = "README.md"


def build(name: str, results: pathlib.Path) -> page.Page:
  """The page of a table; UserError for one that is not there."""
  if name not in TABLES:
    raise UserError(f"table {name!r} is unknown; accepted are {', '.join(TABLES)}")
  return importlib.import_module(f"experiments.tables.{name}").build(results)


def index(pages: list[page.Page]) -> str:
  """The text of the folder's README."""
  body = []
  for p in pages:
    title = p.text.splitlines()[0].lstrip("# ")
    plots = " ".join(f"[{name}.png]({name}.png)" for name in p.figures)
    body.append([f"[{title}]({p.name}.md)", p.status, plots])
  return f"""# Results

    make tables

writes this folder from the lines in `benchmarks/results/` alone: the paper's numbers, and ours with
their seeds, tokens, settings, revision and command. What has no line was not run. Figures are drawn
by matplotlib {mpl.__version__}; another version may draw other pixels.

{page.table(body, ["table", "run so far", "figure"])}
"""


def write(results: pathlib.Path, out: pathlib.Path, names=TABLES) -> None:
  """Writes the pages, and the index when it is all of them; nothing when one cannot be made."""
  pages = [build(name, results) for name in names]
  for p in pages:
    p.write(out)
  if list(names) == list(TABLES):
    provenance.write(out / INDEX, index(pages))


def main(argv: list[str]) -> int:
  """Runs the command line `argv`; 2 for a mistake in what was asked, one sentence on stderr."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("tables", nargs="*", help=", ".join(TABLES))
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="of the lines")
  parser.add_argument("--out", type=pathlib.Path, default=OUT, help="of the pages")
  args = parser.parse_args(argv[1:])
  try:
    write(args.results, args.out, args.tables or TABLES)
  except ValueError as e:
    print("error:", " ".join(str(e).split()), file=sys.stderr)
    return 2
  print(args.out / INDEX)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))

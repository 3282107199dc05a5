"""Pages of language models' rows: the paper's numbers, and beside them what has run.

Everything but the paper's numbers comes from the lines of benchmarks/results/lm/NAME.jsonl. Lines
of one scale, number of tokens and text are a group; a table shows one group, its mixers each at its
best learning rate by validation loss.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from experiments.configs.paper import base
from experiments.errors import UserError
from experiments.tables import lines as lines_lib
from experiments.tables import page

Labels = dict[str, Any]
NAMES = {
  **base.NAMES,
  "trellis_m32": "Trellis, M = 32",
  "trellis_m32_exact": "Trellis, M = 32, C = 1",
  "trellis_wide": "Trellis, M = 32, wide",
  "trellis_wide_exact": "Trellis, M = 32, wide, C = 1",
  "trellis_wide_spread": "Trellis, M = 32, wide, spread starts",
}
NOT_FINITE = "not finite"


@dataclasses.dataclass(frozen=True)
class Group:
  """Rows of one scale, and the lines of those that were run on one text for as many tokens."""

  scale: str
  rows: list[base.Row]
  lines: list[lines_lib.Line]

  def of(self, labels: Labels) -> list[lines_lib.Line]:
    """A row's lines at its best rate, by seed."""
    return lines_lib.best(lines_lib.select(self.lines, {"labels": labels}))

  def by_seed(self, labels: Labels) -> dict[int, float]:
    """A row's perplexity of each seed; {} when it was not run, or not all were finite."""
    lines = self.of(labels)
    failed = any(line["failure"] for line in lines)
    return {} if failed else {line["seed"]: line["test"]["perplexity"] for line in lines}

  def values(self, labels: Labels) -> list[float]:
    """A row's perplexities, in the order of `of`."""
    return list(self.by_seed(labels).values())

  def beside(self, labels: Labels, other: Labels) -> dict[int, tuple[float, float]]:
    """The perplexities of two rows by seed, of the seeds that both were run with."""
    mine, theirs = self.by_seed(labels), self.by_seed(other)
    return {seed: (mine[seed], theirs[seed]) for seed in sorted(set(mine) & set(theirs))}

  def cell(self, labels: Labels) -> str:
    """A row's cell: mean and range over seeds, or why there is none."""
    if any(line["failure"] for line in self.of(labels)):
      return NOT_FINITE
    return page.spread(self.values(labels))

  @property
  def title(self) -> str:
    """What the lines have in common."""
    one = self.lines[0]
    of_row = sorted({line["tokens"] for line in self.lines})
    tokens = " to ".join(f"{n:,}" for n in dict.fromkeys((of_row[0], of_row[-1])))
    return f"{self.scale}: {tokens} tokens of {one['corpus']}"

  @property
  def status(self) -> str:
    """How many of the rows have a number."""
    have = sum(bool(self.of(row.labels)) for row in self.rows)
    return f"{have} of {len(self.rows)} rows at {self.scale}"


def groups(name: str, rows: Callable[[str], Iterable[base.Row]], lines) -> list[Group]:
  """The groups that have a line, by scale; those of the scale's own tokens come first.

  Raises:
    UserError: a line is of no row of its scale.
  """
  found = []
  for scale in base.SCALES:
    of_scale = list(rows(scale))
    have = lines_lib.select(lines, {"scale": scale})
    by_key: dict[tuple, list[lines_lib.Line]] = {}
    for line in have:
      own = [row.tokens for row in of_scale if row.labels == line["labels"]]
      if not own:
        raise UserError(f"{name}.jsonl has labels {line['labels']}, of no row at {scale}")
      asked = 0 if line["tokens"] == own[0] else line["tokens"]
      by_key.setdefault((asked, line["corpus"], line["corpus_digest"]), []).append(line)
    found += [Group(scale, of_scale, by_key[key]) for key in sorted(by_key)]
  return found


def by_seed(differences: Iterable[float]) -> str:
  """Differences of single seeds in brackets; "" for one seed, which the mean says already."""
  shown = [f"{x:+.2f}" for x in differences]
  return f" ({', '.join(shown)} by seed)" if len(shown) > 1 else ""


def seeds(count: int) -> str:
  """How many seeds a difference is of."""
  return "one seed" if count == 1 else f"{count} seeds"


def split(labels: Labels) -> tuple[str, str]:
  """A cell's row and column: its first label, and the others."""
  first, *others = labels.values()
  return NAMES.get(first, str(first)), " ".join(map(str, others))


def grid(rows: Iterable[base.Row], cell: Callable[[base.Row], str], corner: str) -> str:
  """Rows by their first label, columns by the others."""
  by_place = {split(row.labels): cell(row) for row in rows}
  names = list(dict.fromkeys(row for row, _ in by_place))
  columns = list(dict.fromkeys(column for _, column in by_place))
  body = [[name, *(by_place.get((name, c), "") for c in columns)] for name in names]
  return page.table(body, [corner, *columns])


def number(value: float | None) -> str:
  """One of the paper's numbers."""
  return "" if value is None else f"{value:.2f}"


def runs(group: Group) -> str:
  """A line for every row that was run: what it took and where it is from."""
  body = []
  for row in group.rows:
    lines, of_row = group.of(row.labels), lines_lib.select(group.lines, {"labels": row.labels})
    if not lines:
      continue
    one, failed = lines[0], any(line["failure"] for line in lines)
    bits = [] if failed else [line["test"]["bits_per_byte"] for line in lines]
    tried = " ".join(f"{r:g}" for r in sorted({line["peak_lr"] for line in of_row}))
    body.append(
      [
        " ".join(filter(None, split(row.labels))),
        number(row.published) if not isinstance(row.published, tuple) else "",
        group.cell(row.labels),
        NOT_FINITE if failed else page.spread(bits, 3),
        f"{one['peak_lr']:g} of {tried}",
        " ".join(str(line["seed"]) for line in lines),
        f"{one['tokens']:,}",
        f"{one['parameters']:,}",
        f"{one['state_floats']:,}",
        " ".join(sorted({line["revision"] for line in lines})),
        f"`{one['command']}`",
      ]
    )
  columns = ["row", "paper", "perplexity", "bits per byte", "learning rate", "seeds", "tokens"]
  return page.table(body, [*columns, "parameters", "state", "revision", "command of the first"])


def build(
  name: str,
  title: str,
  lines: list[lines_lib.Line],
  *,
  notes: Callable[[Group], list[str]] = lambda group: [],
  figures: Callable[[list[Group]], dict[str, Any]] = lambda found: {},
  published: Callable[[list[base.Row]], str] | None = None,
  more: Callable[[Group], str] | None = None,
) -> page.Page:
  """The page of a table.

  Args:
    name: of the table, a file of experiments/configs/paper.
    title: the page's heading.
    lines: of its runs.
    notes: sentences that compare the rows of a group.
    figures: by name.
    published: the table of the paper's numbers; None is a perplexity a row.
    more: a further table of a group.
  """
  module = importlib.import_module(f"experiments.configs.paper.{name}")
  found = groups(name, module.rows, lines)
  paper = list(module.rows("paper"))
  published = published or (lambda rows: grid(rows, lambda row: number(row.published), "paper"))
  parts = [f"# {title}", module.__doc__.split("\n", 1)[1].strip("\n")]
  if any(row.published is not None for row in paper):
    parts += ["## The paper's numbers", published(paper)]
  for scale in base.SCALES:
    of_scale = [group for group in found if group.scale == scale]
    if not of_scale:
      parts.append(f"Scale {scale}: {page.NOT_RUN}.")
    for group in of_scale:
      cells = grid(group.rows, lambda row, group=group: group.cell(row.labels), "perplexity")
      said = "\n".join(f"* {sentence}" for sentence in notes(group))
      extra = more(group) if more else ""
      parts += [f"## {group.title}", ABOUT, cells, extra, said]
      parts += [f"### Runs at {group.title}", runs(group)]
  status = "; ".join(group.status for group in found) or page.NOT_RUN
  return page.Page(name, "\n\n".join(filter(None, parts)) + "\n", figures(found), status)


ABOUT = """Test perplexity of each row at its best learning rate by validation loss; mean
(least-most) over seeds where there are several. The runs below have bits per byte, the rates that
were tried, and the paper's number of the row that each one stands for."""


def read(results: pathlib.Path, name: str) -> list[lines_lib.Line]:
  """The lines of a table's runs."""
  return lines_lib.read(results / "lm" / f"{name}.jsonl", lines_lib.FIELDS)

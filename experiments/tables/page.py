"""A page of results: markdown, its tables again in LaTeX, and figures as PNG."""

import dataclasses
import pathlib
import re
import statistics
from collections.abc import Iterable, Mapping

import tabulate
from matplotlib.figure import Figure

from experiments import plots, provenance

NOT_RUN = "not run"
_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {c: f"\\{c}" for c in "&%$#_{}"}


@dataclasses.dataclass(frozen=True)
class Page:
  """What a table's file returns: its text, its figures by name, and its line of the index."""

  name: str
  text: str
  figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
  status: str = ""

  def write(self, folder: pathlib.Path) -> None:
    """Writes NAME.md, NAME.tex and the figures."""
    provenance.write(folder / f"{self.name}.md", self.text)
    provenance.write(folder / f"{self.name}.tex", latex(self.text))
    for name, figure in self.figures.items():
      with plots.style():
        plots.save(figure, folder / f"{name}.png")


def table(rows: Iterable[Iterable[str]], columns: Iterable[str]) -> str:
  """A markdown table."""
  return tabulate.tabulate(list(rows), list(columns), tablefmt="github", disable_numparse=True)


def spread(values: Iterable[float], digits: int = 2) -> str:
  """ "10.87 (10.85-10.90)", mean and range, or "10.87" of one value, or "not run" of none."""
  values = list(values)
  if not values:
    return NOT_RUN
  mean = f"{statistics.fmean(values):.{digits}f}"
  if len(values) == 1:
    return mean
  return f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def latex(text: str) -> str:
  """The tables of a markdown text, each with its heading for a caption."""
  parts, heading, rows = [], "", []
  for line in [*text.splitlines(), ""]:
    if line.startswith("|"):
      rows.append([cell.strip() for cell in line.strip("|").split("|")])
      continue
    if rows:
      head, _, *body = rows  # the second line is the rule
      line_of = lambda cells: " & ".join(map(_escape, cells)) + r" \\"
      columns = "l" + "r" * (len(head) - 1)
      parts.append(
        "\n".join(
          [
            r"\begin{table}",
            rf"\caption{{{_escape(heading)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            line_of(head),
            r"\midrule",
            *map(line_of, body),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
          ]
        )
      )
      rows = []
    if match := re.match(r"#+ (.*)", line):
      heading = match[1]
  return "% Needs booktabs.\n" + "\n\n".join(parts) + "\n"


def _escape(text: str) -> str:
  return "".join(_SPECIAL.get(c, c) for c in text.replace("`", ""))

"""Table 2: what each part of Trellis is worth."""

import math
import pathlib
import statistics

from experiments.configs.paper import table2
from experiments.tables import figures, language, page

CLAIMED = (  # each costs perplexity in the paper
  *("no_forget", "linear_phi_f_ln_silu", "f_softmax"),
  *("linear_phi_f_softmax", "f_l2_silu", "slots_32"),
)
STALE = ("stale_16", "stale_64", "stale_64_half")  # in chunks, as `trellis` is, beside `exact`


def notes(group: language.Group) -> list[str]:
  """What the ablations cost that cost perplexity in the paper, and what chunks do."""
  said = []
  for kind in ("", "plain_"):
    said += [_cost(group, kind, name) for name in CLAIMED if kind + name in table2.ROWS]
  for kind in ("", "plain_"):
    said += [_chunks(group, kind, name) for name in ("trellis", *STALE)]
  return list(filter(None, said))


def _cost(group: language.Group, kind: str, name: str) -> str:
  """An ablation beside Trellis, over the seeds that both were run with."""
  both = group.beside(dict(row=kind + name), dict(row=f"{kind}trellis")).values()
  if not both:
    return f"{kind}{name}: {page.NOT_RUN}."
  costs = [without - whole for without, whole in both]
  cost = statistics.fmean(costs)
  there = table2.PUBLISHED[name] - table2.PUBLISHED["trellis"]
  return (
    f"{kind}{name} {'costs' if cost > 0 else 'does NOT cost'} perplexity: {cost:+.2f}"
    f"{language.by_seed(costs)} (the paper: {there:+.2f}), {language.seeds(len(both))}."
  )


def _chunks(group: language.Group, kind: str, name: str) -> str:
  """A form of the chunk beside the exact recurrence, in the loss; "" for what was not run."""
  both = group.beside(dict(row=kind + name), dict(row=f"{kind}exact")).values()
  if not both:
    return ""
  mine, exact = (statistics.fmean(map(math.log, values)) for values in zip(*both))
  return (
    f"{kind}{name}: {mine:.3f} nats, {mine / exact - 1:+.1%} of the {exact:.3f} of C = 1, "
    f"{language.seeds(len(both))}."
  )


def plot(found: list[language.Group]):
  """A dot for each row, the paper's and each of our groups."""
  panels = [
    ("the paper: 125M, Pile", {n: figures.Point.of(0, [v]) for n, v in table2.PUBLISHED.items()})
  ]
  for group in found:
    values = {row.labels["row"]: group.values(row.labels) for row in group.rows}
    panels.append((group.title, {name: figures.Point.of(0, v) for name, v in values.items() if v}))
  return {"table2": figures.dots(panels, "Ablations", "perplexity")}


def build(results: pathlib.Path) -> page.Page:
  """The page of Table 2."""
  return language.build(
    "table2", "Table 2: ablations", language.read(results, "table2"), notes=notes, figures=plot
  )

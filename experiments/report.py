"""Reports on a trained run: held-out perplexity beside baselines, a sampled completion, plots.

    python -m experiments.report --config=experiments/configs/default.py --config.workdir=runs/NAME

Takes the config that the run was trained with, restores the newest checkpoint of its workdir, and
evaluates on the test split, which training never reads. Writes workdir/report.json and
workdir/plots/*.png. `--max_tokens=N` evaluates about the first N tokens of the split only.
"""

import argparse
import itertools
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import ml_collections
import numpy as np
import rich.box
import rich.console
import rich.progress
import rich.table
from flax import nnx

from experiments import config, metrics, plots, provenance, tokenise, train
from experiments import mesh as mesh_lib
from experiments.console import si
from experiments.errors import UserError
from experiments.evals import baselines, perplexity, runs
from trellis_jax import LM, generate, inspect

SPLIT = "test"
PROMPT_TOKENS, NEW_TOKENS, TEMPERATURE, TOP_P = 96, 128, 0.8, 0.95
TRACE_ROWS, TRACE_SNAPSHOTS = 8, 32


def open_run(cfg: ml_collections.ConfigDict) -> tuple[train.Job, Any]:
  """The run of a config and the parameters of its newest checkpoint, on this machine's mesh.

  Raises:
    ValueError: there is no checkpoint, or another run's, or the config or the data are bad.
  """
  if task := cfg.data.task:
    raise UserError(f"config.data.task = {task!r} is given, but a report is on text")
  return runs.open_run(cfg)


def evaluate(
  job: train.Job, params: Any, max_tokens: int, console: rich.console.Console
) -> list[perplexity.Totals]:
  """The model's totals on the split by position bucket; see `main` for `max_tokens`."""
  graphdef, _ = nnx.split(job.lm, nnx.Param)
  rows = len(_split(job).rows(job.cfg.seq_len, job.cfg.data.packing, job.cfg.data.align))
  total = -(-rows // job.cfg.batch_size)

  def batches():
    return rich.progress.track(
      _batches(job, max_tokens),
      "evaluating",
      total=min(total, _limit(job, max_tokens) or total),
      console=console,
      transient=True,
      disable=not console.is_terminal,
    )

  evaluator = perplexity.Evaluator(
    perplexity.predict(graphdef),
    batches=batches,
    seq_len=job.cfg.seq_len,
    token_bytes=tokenise.token_bytes(job.dataset.tokenizer),
    put_batch=lambda batch: mesh_lib.put_batch(batch, job.mesh),
  )
  return evaluator.totals(params)


def measure(job: train.Job, totals: list[perplexity.Totals], max_tokens: int) -> dict[str, Any]:
  """The numbers of a report, as they go into report.json: the model's beside the baselines'."""
  total, split = perplexity.add(totals), _split(job)
  base = baselines.load(job.dataset, SPLIT, total.tokens)
  # Batches come in the file's order, so their targets are those of the baselines.
  buckets = [
    perplexity.buckets(batch["segment_ids"])[batch["weights"] > 0]
    for batch in _batches(job, max_tokens)
  ]
  bucket = np.concatenate(buckets)[: base.targets]
  by_position = [
    {
      "first": first,
      "last": last,
      "tokens": part.tokens,
      "nats": part.nats,
      "perplexity": part.perplexity if part.tokens else None,
      "bigram_perplexity": base.perplexity(2, here) if (here := bucket == i).any() else None,
    }
    for i, ((first, last), part) in enumerate(zip(perplexity.ranges(job.cfg.seq_len), totals))
  ]
  return {
    "step": job.start,
    "parameters": sum(x.size for x in jax.tree.leaves(nnx.split(job.lm, nnx.Param)[1])),
    "corpus": split.header.corpus,
    "tokenizer": split.header.tokenizer,
    "split": SPLIT,
    "whole_split": total.tokens == split.num_tokens - 1,
    "tokens": total.tokens,
    "bytes": total.bytes,
    "nats": total.nats,
    "perplexity": total.perplexity,
    "bits_per_byte": total.bits_per_byte,
    "by_position": by_position,
    "baseline_tokens": base.targets,
    "baselines": base.rows(),
  }


def show(report: dict[str, Any], console: rich.console.Console) -> None:
  """Prints the tables."""
  part = "all" if report["whole_split"] else "the first"
  console.print(
    f"step {report['step']}, {si(report['parameters']).strip()} parameters, on {part} "
    f"{report['tokens']:,} tokens = {report['bytes']:,} bytes of the {report['split']} split "
    f"of {report['corpus']}"
  )
  number = lambda x, digits: "" if x is None else f"{x:,.{digits}f}"
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title="Held out", title_justify="left")
  table.add_column("")
  for name in ("perplexity per token", "bits per byte"):
    table.add_column(name, justify="right")
  rows = {"model": report, **report["baselines"]}
  for name, row in rows.items():
    cells = number(row.get("perplexity"), 2), number(row["bits_per_byte"], 3)
    table.add_row(name, *cells, style="bold" if name == "model" else "")
  console.print(table)
  if report["baseline_tokens"] < report["tokens"]:
    console.print(f"baselines on the first {report['baseline_tokens']:,} tokens")
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title="By position", title_justify="left")
  for name in ("tokens seen before", "tokens", "perplexity", "token bigram's, same tokens"):
    table.add_column(name, justify="right")
  for row in report["by_position"]:
    cells = number(row["perplexity"], 2), number(row["bigram_perplexity"], 2)
    table.add_row(f"{row['first']}-{row['last']}", f"{row['tokens']:,}", *cells)
  console.print(table)


def sample(job: train.Job, lm: LM, console: rich.console.Console) -> dict[str, str]:
  """Continues the beginning of a held-out document, printing the tokens as they come."""
  tokenizer, split = job.dataset.tokenizer, _split(job)
  document = split.document(int(np.argmax(split.document_bytes)))
  prompt = [int(t) for t in document[: min(PROMPT_TOKENS, len(document) // 2)]]
  how = f"temperature {TEMPERATURE}, top-p {TOP_P}, seed {job.cfg.seed}"
  console.rule("A held-out document begins", align="left")
  console.out(printable(tokenizer.decode(prompt)), highlight=False)
  console.rule(f"and the model goes on ({how})", align="left")
  said, shown = [], 0

  def on_token(_, tokens):
    nonlocal shown
    said.extend(int(t) for t in tokens if t >= 0)
    # A character's last bytes may still come; until then it decodes as U+FFFD.
    text = tokenizer.decode(said).rstrip("\ufffd")
    console.out(printable(text[shown:]), end="", highlight=False)
    console.file.flush()
    shown = max(shown, len(text))

  generate(
    lm,
    [[tokenizer.bos_id, *prompt]],
    max_new_tokens=NEW_TOKENS,
    temperature=TEMPERATURE,
    top_p=TOP_P,
    stop_tokens=[tokenizer.eos_id],
    rng=job.cfg.seed,
    on_token=on_token,
  )
  console.out("")
  console.rule()
  return {"prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(said)}


def printable(text: str) -> str:
  """The text without control characters, which could command a terminal."""
  return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def trace(job: train.Job, lm: LM) -> tuple[plots.Layers, np.ndarray]:
  """What the memories do while the split's longest documents are read from their beginning.

  Returns:
    The traces of the layers that have memories, by number from 1, and where the rows [B, T] hold
    tokens; the first row holds T.
  """
  split = _split(job)
  lengths = np.diff(split.offsets)  # with the separator before the document
  longest = np.argsort(-lengths, kind="stable")[:TRACE_ROWS]
  length = min(job.cfg.seq_len, int(lengths[longest[0]]))
  snapshots = min(TRACE_SNAPSHOTS, length)
  length -= length % snapshots
  tokens = np.full((len(longest), length), split.header.separator, np.int32)
  live = np.zeros(tokens.shape, bool)
  for i, document in enumerate(longest):
    row = split.tokens[split.offsets[document] :][: min(length, lengths[document])]
    tokens[i, : len(row)], live[i, : len(row)] = row, True
  ids = live.astype(np.int32)
  traces = inspect.trace_lm(lm, tokens, segment_ids=ids, every=length // snapshots)
  layers = {i: jax.tree.map(np.asarray, t) for i, t in enumerate(traces, 1) if t}
  return layers, live


def draw(job: train.Job, lm: LM, report: dict[str, Any]) -> list[pathlib.Path]:
  """Writes the figures that there is something for, and returns their paths."""
  folder = job.workdir / "plots"
  folder.mkdir(exist_ok=True)
  figures = {}
  levels = {
    f"{name}, test split": math.log(report["baselines"][name]["perplexity"])
    for name in ("token unigram", "token bigram")
  }
  with plots.style():
    if (path := job.workdir / metrics.JSONL).is_file() and (records := metrics.read(path)):
      figures["loss"] = plots.loss(records, levels)
    rows = report["by_position"]
    column = lambda name: [math.nan if row[name] is None else row[name] for row in rows]
    figures["perplexity_by_position"] = plots.perplexity_by_position(
      [(row["first"], row["last"]) for row in rows],
      column("perplexity"),
      column("bigram_perplexity"),
      report["baselines"]["token bigram"]["perplexity"],
    )
    layers, live = trace(job, lm)
    if layers:
      figures["inner_loss"] = plots.inner_loss(layers, live)
      figures["gates"] = plots.gates(layers, live)
      layer, head = plots.most_used(layers)
      figures["memories"] = plots.memories(layers[layer], layer, head)
    for name, figure in figures.items():
      plots.save(figure, folder / f"{name}.png")
  return [folder / f"{name}.png" for name in figures]


def run(job: train.Job, params: Any, max_tokens: int) -> dict[str, Any]:
  """Prints, draws and writes the report of restored parameters; returns what report.json holds."""
  start = time.perf_counter()
  console = rich.console.Console(highlight=False, emoji=False, markup=False)
  with jax.set_mesh(job.mesh):
    totals = evaluate(job, params, max_tokens, console)
    report = measure(job, totals, max_tokens)
    show(report, console)
    lm = runs.model(job, params)
    report["sample"] = sample(job, lm, console)
    written = draw(job, lm, report)
  report["plots"] = [str(path.relative_to(job.workdir)) for path in written]
  report["seconds"] = round(time.perf_counter() - start, 1)
  path = job.workdir / "report.json"
  provenance.write(path, json.dumps(report, indent=2) + "\n")
  console.print(f"{path} and {len(written)} plots beside it, in {report['seconds']} s")
  return report


def _split(job: train.Job):
  return job.dataset.splits[SPLIT]


def _batches(job: train.Job, max_tokens: int):
  """The split's batches in order, as many as hold `max_tokens` positions; 0 = all."""
  batches = job.batches(SPLIT, shuffle=False, repeat=False)
  return itertools.islice(batches, _limit(job, max_tokens))


def _limit(job: train.Job, max_tokens: int) -> int | None:
  return -(-max_tokens // (job.cfg.batch_size * job.cfg.seq_len)) or None


def _parse(argv: list[str]) -> tuple[ml_collections.ConfigDict, int]:
  """The config of a command line, and its --max_tokens."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument("--max_tokens", nargs="?", default="0", const="")
  given, rest = parser.parse_known_args(argv)
  if not given.max_tokens.isdecimal():
    raise UserError(f"--max_tokens={given.max_tokens} is given, but it must be an integer >= 0")
  return config.parse(rest), int(given.max_tokens)


def main(argv: list[str]) -> int:
  """Runs the command line `argv`; 2 for a mistake in what was asked, one sentence on stderr."""
  if {"--help", "-h"} & set(argv):
    print(__doc__)
    return 0
  try:
    cfg, max_tokens = _parse(argv)
    job, params = open_run(cfg)
  except (ValueError, FileNotFoundError) as e:
    print("error:", " ".join(str(e).split()), file=sys.stderr)
    return 2
  run(job, params, max_tokens)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))

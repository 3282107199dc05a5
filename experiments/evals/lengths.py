"""Held-out loss by length of the window and by position in it, on any text.

    python -m experiments.evals.lengths --config=... --lengths=512,1024,2048,4096,8192

Takes the config of a run on text and restores its newest checkpoint. The text's documents stand one
after the other and are cut into windows of T tokens that do not overlap; each is read from nothing,
every token is a target once, and there is a line for each T: nats, perplexity, bits per byte, and
all of these by position (see evals/perplexity.py), which an average over windows hides. So T may
also be longer than what was trained on. Flags, besides the run's:

    --lengths=512,1024,2048,4096   tokens of a window
    --data=PATH                    a token file (.tok) of the run's tokenizer, of which all is read;
                                   or text as in data.path, tokenised once under data.cache;
                                   the run's own without
    --split=test                   of text: train, validation or test
    --packing=concat               or documents: then what stands before one is not seen
    --max_tokens=0                 about the first N tokens; 0 is all
    --rows_tokens=8192             about how many tokens are read at a time

A line goes to workdir/lengths.jsonl as its length ends, and is not run again while run, checkpoint
and flags are the same.
"""

import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import rich.console
import rich.progress
import tabulate
from flax import nnx

from experiments import data, packing, tokenise, train
from experiments.corpus import SPLITS
from experiments.errors import UserError
from experiments.evals import perplexity, runs
from experiments.tokenfile import TokenFile

FLAGS = {
  "lengths": "512,1024,2048,4096",
  "data": "",
  "split": "test",
  "packing": "concat",
  "max_tokens": "0",
  "rows_tokens": "8192",
}
FILE = "lengths.jsonl"


def open_text(job: train.Job, path: str, split: str) -> TokenFile:
  """The tokens at a path, of the run's tokenizer; UserError for those of another one."""
  if not path:
    return job.dataset.splits[split]
  if path.endswith(".tok"):
    found = TokenFile(pathlib.Path(path).expanduser())
    if found.header.tokenizer_digest != tokenise.digest(job.dataset.tokenizer):
      raise UserError(
        f"--data={path} was made with another tokenizer ({found.header.tokenizer}) than the run's"
        f" ({job.dataset.tokenizer.name})"
      )
    return found
  section = ml_collections.ConfigDict(job.cfg.data.to_dict())
  section.path = path
  if not isinstance(job.dataset.tokenizer, tokenise.ByteTokenizer):
    section.tokenizer = str(job.dataset.test.path.with_name("tokenizer.json"))
  return data.load_text(section).splits[split]


def scorer(
  job: train.Job, text: TokenFile, cell: dict[str, Any], rows_tokens: int, track=lambda x, _: x
) -> Callable[[Any], dict[str, Any]]:
  """What gives the numbers of one length for parameters, over all targets and by position.

  Args:
    job: the run.
    text: what is read, cut as `cell` says: its `length`, `packing` and `max_tokens`.
    rows_tokens: about how many tokens are read at a time.
    track: (batches, how many) -> the same batches, for progress.
  """
  length = cell["length"]
  size = max(1, rows_tokens // length)
  limit = -(-cell["max_tokens"] // (size * length)) or None
  count = -(-len(text.rows(length, cell["packing"])) // size)
  graphdef, _ = nnx.split(job.lm, nnx.Param)

  def batches():
    loader = data.loader(
      text,
      seq_len=length,
      batch_size=size,
      packing=cell["packing"],
      shuffle=False,
      repeat=False,
    )
    return track(itertools.islice(loader, limit), min(count, limit or count))

  evaluator = perplexity.Evaluator(
    perplexity.predict(graphdef),
    batches=batches,
    seq_len=length,
    token_bytes=tokenise.token_bytes(runs.tokenizer(job)),
  )

  def score(params: Any) -> dict[str, Any]:
    parts = evaluator.totals(params)
    by_position = [
      {"first": first, "last": last, **_numbers(part)}
      for (first, last), part in zip(perplexity.ranges(length), parts)
    ]
    return _numbers(perplexity.add(parts)) | {"by_position": by_position}

  return score


def own_scorer(job: train.Job, split: str, max_tokens: int) -> Callable[[Any], dict[str, Any]]:
  """`scorer` of a split of the run's own text or task, in rows like those that it is trained on."""
  cfg = job.cfg
  cell = {"length": cfg.seq_len, "packing": cfg.data.packing, "max_tokens": max_tokens}
  return scorer(job, open_text(job, "", split), cell, cfg.batch_size * cfg.seq_len)


def _numbers(part: perplexity.Totals) -> dict[str, Any]:
  """What is kept of some targets; what needs a token, or a byte, is null without."""
  return {
    "tokens": part.tokens,
    "bytes": part.bytes,
    "nats": part.nats,
    "perplexity": part.perplexity if part.tokens else None,
    "bits_per_byte": part.bits_per_byte if part.bytes else None,
  }


def evaluate(cfg, given) -> None:
  """Runs what is missing of a run's lengths, and prints their tables."""
  lengths = runs.integers(given, "lengths")
  max_tokens = runs.integer(given, "max_tokens")
  rows_tokens = runs.integer(given, "rows_tokens", 1)
  for name, accepted in (("split", SPLITS), ("packing", packing.PACKINGS)):
    if (value := getattr(given, name)) not in accepted:
      raise UserError(f"--{name}={value} is given; accepted are {', '.join(accepted)}")
  if cfg.data.task:
    raise UserError(f"config.data.task = {cfg.data.task!r} is given, but this reads text")
  job, params = runs.open_run(cfg)
  text = open_text(job, given.data, given.split)
  lines, console = runs.Lines(job.workdir / FILE), rich.console.Console(highlight=False)
  about = {"step": job.start, "trained_on": cfg.seq_len, "corpus": text.header.corpus}
  about |= {"corpus_digest": text.header.corpus_digest, "split": given.split}
  about |= {"packing": given.packing, "max_tokens": max_tokens}
  cells = [{"length": length, **about} for length in lengths]
  for cell in cells:
    if lines.find(cell):
      continue
    track = lambda batches, total, cell=cell: rich.progress.track(
      batches,
      f"windows of {cell['length']}",
      total=total,
      console=console,
      transient=True,
      disable=not console.is_terminal,
    )
    with jax.set_mesh(job.mesh):
      found = scorer(job, text, cell, rows_tokens, track)(params)
    lines.add(cell, **found)
    console.print(f"windows of {cell['length']}: perplexity {found['perplexity']:.2f}")
  print(table([lines.find(cell) for cell in cells]))


def table(lines: list[dict[str, Any]]) -> str:
  """Perplexity and bits per byte by length, then perplexity by position, a column for a length."""
  lines = sorted(lines, key=lambda line: line["length"])
  names = ("length", "tokens", "perplexity", "bits_per_byte")
  total = tabulate.tabulate([[line[name] for name in names] for line in lines], names)
  longest = lines[-1]["by_position"]
  cells = {
    (line["length"], part["first"]): part["perplexity"]
    for line in lines
    for part in line["by_position"]
  }
  rows = [
    [part["first"], *(cells.get((line["length"], part["first"])) for line in lines)]
    for part in longest
  ]
  columns = ["position from", *(str(line["length"]) for line in lines)]
  return f"{total}\n\n{tabulate.tabulate(rows, columns, floatfmt='.2f')}"


def main(argv: list[str]) -> int:
  """Runs the command line `argv` and returns its exit code."""
  return runs.command(argv, __doc__, FLAGS, evaluate)


if __name__ == "__main__":
  sys.exit(main(sys.argv))

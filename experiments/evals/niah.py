"""Single-needle retrieval by generation (RULER's S-NIAH 1 to 3), at any length.

    python -m experiments.evals.niah --config=... --haystack=FOLDER --lengths=1024,4096,16384

Takes the config of a run on text, or on data.task niah, and restores its newest checkpoint. A
sample's score is 1 when the answer stands in the 128 likeliest tokens that the model adds, whatever
the case of its letters, and 0 when not. Flags, besides the run's:

    --kinds=niah_single_1,niah_single_2,niah_single_3
    --lengths=1024,2048,4096,8192   tokens of prompt, prefix and the 128 to generate
    --samples=500                   of each kind and length
    --haystack=PATH                 text for kinds 2 and 3: a folder or files, as data.path
    --words=FOLDER                  RULER's adjectivelist.txt and nounlist.txt; our own without
    --needle=true                   false leaves the needle out: what is left is guessing
    --rows=8                        samples read at a time

Each kind and length adds a line to workdir/niah.jsonl as it ends, and is not run again while run,
checkpoint and flags are the same.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import rich.console
import rich.progress
import tabulate

from experiments import essays, haystacks, needles, tokenise
from experiments.errors import UserError
from experiments.evals import decode, runs

FLAGS = {
  "kinds": ",".join(needles.KINDS),
  "lengths": "1024,2048,4096,8192",
  "samples": "500",
  "haystack": "",
  "words": "",
  "needle": "true",
  "rows": "8",
}
FILE = "niah.jsonl"
SHOWN = 3  # outputs kept of each kind and length

# (prompts as tokens, most new tokens, done(row, tokens)) -> new tokens of each prompt
Generate = Callable[[list[list[int]], int, Callable[[int, list[int]], bool]], list[list[int]]]


class Evaluator:
  """Scores samples by what a model goes on with."""

  def __init__(self, generate: Generate, tokenizer: tokenise.Tokenizer, rows: int = 8):
    """Args: the model, its tokenizer, and how many samples it reads at a time."""
    self.generate, self.tokenizer, self.rows = generate, tokenizer, rows

  def run(
    self, sample: Callable[[int], needles.Sample], count: int
  ) -> Iterator[tuple[needles.Sample, bool, str]]:
    """Yields (sample, whether the answer is in it, what was generated) for each number."""
    for start in range(0, count, self.rows):
      batch = [sample(number) for number in range(start, min(start + self.rows, count))]
      prompts = [
        [self.tokenizer.bos_id, *self.tokenizer.encode(s.prompt + s.prefix)] for s in batch
      ]
      done = lambda i, tokens, batch=batch: (
        self.tokenizer.eos_id in tokens or right(batch[i].answer, self.text(tokens))
      )
      for asked, new in zip(batch, self.generate(prompts, needles.NEW_TOKENS, done)):
        text = self.text(new)
        yield asked, right(asked.answer, text), text

  def text(self, tokens: list[int]) -> str:
    """What tokens say up to the end of the document."""
    end = self.tokenizer.eos_id
    return self.tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens)


def right(answer: str, text: str) -> bool:
  """Whether the answer stands in a text."""
  return answer.lower() in text.lower()


def generate_with(decoder: decode.Decoder) -> Generate:
  """Greedy generation by a model."""
  return lambda prompts, most, done: decoder.greedy(decoder.read(prompts), most, done)


def cells_of(given) -> list[dict[str, Any]]:
  """What is to be run, as the fields that a line of results begins with; UserError for a bad flag.

  A cell's numbers depend on nothing else but the checkpoint.
  """
  kinds = [kind.strip() for kind in given.kinds.split(",")]
  if unknown := [kind for kind in kinds if kind not in needles.KINDS]:
    raise UserError(f"--kinds: {unknown[0]!r} is unknown; accepted are {', '.join(needles.KINDS)}")
  if given.needle not in ("true", "false"):
    raise UserError(f"--needle={given.needle} is given; accepted are true, false")
  shared = {"samples": runs.integer(given, "samples", 1), "needle": given.needle == "true"}
  shared |= {"haystack": given.haystack, "words": given.words}
  lengths = runs.integers(given, "lengths")
  return [{"kind": kind, "length": n, **shared} for kind in kinds for n in lengths]


def evaluate(cfg, given) -> None:
  """Runs what is missing of a run's cells, and prints its table."""
  cells, rows = cells_of(given), runs.integer(given, "rows", 1)
  essay = essays.load(given.haystack) if given.haystack else None
  words = needles.words_of(given.words)
  job, params = runs.open_run(cfg)
  tokenizer = runs.tokenizer(job)
  generators = {}
  for cell in cells:  # refuses before the first of them is run
    kind = cell["kind"]
    generators[kind] = haystacks.Generator(kind, tokenizer, essay=essay, words=words)
    generators[kind].sample(0, cell["length"])
  decoder = decode.Decoder(runs.model(job, params, max(cell["length"] for cell in cells)))
  evaluator = Evaluator(generate_with(decoder), tokenizer, rows)
  lines = runs.Lines(job.workdir / FILE)
  console = rich.console.Console(highlight=False)
  for cell in cells:
    cell |= {"step": job.start}
    if lines.find(cell):
      continue
    make = lambda i, cell=cell: generators[cell["kind"]].sample(i, cell["length"], cell["needle"])
    hits, outputs = 0, []
    with jax.set_mesh(job.mesh):
      for asked, hit, text in rich.progress.track(
        evaluator.run(make, cell["samples"]),
        f"{cell['kind']} {cell['length']}",
        total=cell["samples"],
        console=console,
        transient=True,
        disable=not console.is_terminal,
      ):
        hits += hit
        if len(outputs) < SHOWN:
          outputs.append({"answer": asked.answer, "output": text})
    score = hits / cell["samples"]
    lines.add(cell, score=score, outputs=outputs)
    console.print(f"{cell['kind']} {cell['length']}: {score:.3f}")
  print(table(cells, lines))


def table(cells: list[dict[str, Any]], lines: runs.Lines) -> str:
  """The scores, kinds by lengths."""
  lengths = sorted({cell["length"] for cell in cells})
  kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
  by_place = {(cell["kind"], cell["length"]): 100 * lines.find(cell)["score"] for cell in cells}
  rows = [[kind, *(by_place[kind, n] for n in lengths)] for kind in kinds]
  return tabulate.tabulate(rows, ["", *map(str, lengths)], floatfmt=".1f")


def main(argv: list[str]) -> int:
  """Runs the command line `argv` and returns its exit code."""
  return runs.command(argv, __doc__, FLAGS, evaluate)


if __name__ == "__main__":
  sys.exit(main(sys.argv))

r"""Writes text of needles in haystacks, with their answers, for a language model to train on.

    python -m experiments.needle_text --to=FOLDER --haystack=TEXT
    python -m experiments.tables.run table3 --data=FOLDER --tasks=TEXT

A document is a sample of S-NIAH with its answer (experiments/needles.py), the kinds in turn, of a
length in bytes drawn evenly on a logarithmic scale. The needles of a split hide in the haystack's
own text of that split, which begins at a random word: were it always the first, as in what is
scored, a model would learn that text by heart. Other documents are lists of facts, one to six keys
whose values are said again and again: a small model learns there to say again what was said, which
an answer in a thousand tokens hardly teaches. Flags:

    --to=FOLDER         gets train.jsonl, validation.jsonl and test.jsonl, lines of {"text": ...}
    --haystack=PATH     a folder or files, as data.path; the standard library without
    --kinds=niah_single_1,niah_single_2,niah_single_3
    --documents=12000   of the train split; the others have a twentieth each
    --facts=0.5         share of the documents that are lists of facts
    --least=512         bytes of the shortest samples, or as many as the question takes
    --most=4096         bytes of the longest
    --words=FOLDER      RULER's adjectivelist.txt and nounlist.txt; our own without
    --seed=0
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator

import numpy as np

from experiments import corpus, essays, needles, provenance, tokenise
from experiments.errors import UserError
from experiments.tasks import niah

HELD_OUT = 20  # documents to train on for one of each other split
ANSWER = len(" .") + niah.ANSWER_BYTES
MOST_FACTS, TIMES = 6, 5  # keys of a list at most, and how often each is said, on average


def facts(rng: np.random.Generator, kind: str, words: tuple[list[str], list[str]]) -> str:
  """A list of facts: each key with its value once, then keys at random with theirs.

  Args:
    rng: what is drawn with.
    kind: of needles.KINDS, whose values they have.
    words: (adjectives, nouns) of the keys.
  """
  drawn = range(rng.integers(1, MOST_FACTS + 1))
  known = {needles.key(rng, words): needles.value(rng, kind) for _ in drawn}
  said, count = [f"{key} is {value}." for key, value in known.items()], len(known)
  order = [*rng.permutation(count), *rng.integers(count, size=(TIMES - 1) * count)]
  return "\n".join(said[i] for i in order)


def documents(
  split: str,
  count: int,
  share: float,
  least: int,
  most: int,
  kinds: list[str],
  essay: essays.Essay,
  **knobs,
) -> Iterator[str]:
  """Yields the documents of a split.

  Args:
    split: of the seeds.
    count: of documents.
    share: of lists of facts among them.
    least, most: bytes of the others.
    kinds: of needles.KINDS, taken in turn.
    essay: where those hide that are not hidden in noise.
    **knobs: of tasks.niah.Generator: `words`, `seed`.

  Raises:
    UserError: an unknown kind, or a longest document in which a question has no room.
  """
  tokenizer = tokenise.ByteTokenizer()
  knobs |= dict(essay=essay, split=split, new_tokens=ANSWER, anywhere=True)
  make = [niah.Generator(kind, tokenizer, **knobs) for kind in kinds]
  rng = np.random.default_rng([knobs["seed"], corpus.SPLITS.index(split)])
  for number in range(count):
    kind = number % len(kinds)
    if rng.random() < share:
      yield facts(rng, kinds[kind], knobs["words"])
      continue
    sample = make[kind].spread(number, least, most, rng.random())
    yield f"{sample.prompt}{sample.prefix} {sample.answer}."


def write(args: argparse.Namespace) -> None:
  """Writes the three files, each at once; UserError before the first where a flag is bad."""
  kinds = [kind.strip() for kind in args.kinds.split(",")]
  knobs = dict(kinds=kinds, words=needles.words_of(args.words), seed=args.seed)
  texts = {split: essays.load(args.haystack, split) for split in corpus.SPLITS}
  sizes = {split: -(-args.documents // HELD_OUT) for split in corpus.SPLITS}
  sizes["train"] = args.documents
  shape = args.facts, args.least, args.most
  made = {s: documents(s, sizes[s], *shape, essay=texts[s], **knobs) for s in corpus.SPLITS}
  files = {s: [json.dumps({"text": text}) + "\n" for text in found] for s, found in made.items()}
  for split, lines in files.items():
    provenance.write(args.to / f"{split}.jsonl", "".join(lines))
    print(f"{args.to / split}.jsonl: {len(lines):,} documents, {sum(map(len, lines)):,} bytes")


def main(argv: list[str]) -> int:
  """Runs the command line `argv`; 2 for a mistake in it, one sentence on stderr."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("--to", type=pathlib.Path, required=True)
  parser.add_argument("--kinds", default=",".join(needles.KINDS))
  for name in ("haystack", "words"):
    parser.add_argument(f"--{name}", default="")
  for name, value in (("documents", 12_000), ("least", 512), ("most", 4096), ("seed", 0)):
    parser.add_argument(f"--{name}", type=int, default=value)
  parser.add_argument("--facts", type=float, default=0.5)
  args = parser.parse_args(argv[1:])
  try:
    if not 0 <= args.facts <= 1:
      raise UserError(f"--facts={args.facts} is given; accepted is from 0 to 1")
    for name, accepted in (("documents", 1), ("least", 1), ("most", args.least), ("seed", 0)):
      if (value := getattr(args, name)) < accepted:
        raise UserError(f"--{name}={value} is given; accepted is at least {accepted}")
    write(args)
  except UserError as e:
    print("error:", e, file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))

"""What it saves to read a context once for all of its continuations, as multiple choice does.

    python -m benchmarks.scoring_cost

Questions of c tokens with 4 choices of 16 tokens each, scored with the context's state reused, and
with every context read again for each choice; the two must agree. Writes results/scoring_cost.md.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import tabulate
from flax import nnx

from benchmarks import timing
from experiments import provenance
from experiments.evals import scoring
from trellis_jax import LM, LMConfig

RESULTS = pathlib.Path(__file__).parent / "results" / "scoring_cost.md"
CONTEXTS = (64, 256, 1024)  # tokens
QUESTIONS, CHOICES, CHOICE = 16, 4, 16  # tokens of a choice
ROUNDS, TOLERANCE = 3, 1e-4  # nats, relative


def apart(scorer: scoring.Scorer, pairs) -> list[float]:
  """The same log-likelihoods, every pair by itself; in batches as large."""
  found = []
  for start in range(0, len(pairs), scorer.rows):
    some = pairs[start : start + scorer.rows]
    reading = scorer.decoder.read([[scorer.bos_id, *context] for context, _ in some])
    found += (-scorer.decoder.score(reading, [more for _, more in some])[0]).tolist()
  return found


def measure(scorer: scoring.Scorer, vocab: int, context: int, rounds: int) -> list:
  """A row of the table; RuntimeError when the two ways disagree."""
  rng = np.random.default_rng(context)
  draw = lambda n: rng.integers(1, vocab, n).tolist()
  questions = [draw(context) for _ in range(QUESTIONS)]
  pairs = [(question, draw(CHOICE)) for question in questions for _ in range(CHOICES)]
  reused, again = [value for value, _ in scorer.loglikelihoods(pairs)], apart(scorer, pairs)
  if not np.allclose(reused, again, rtol=TOLERANCE, atol=0):
    raise RuntimeError(f"context {context}: {reused} and {again} are not the same")
  sides = {"once": lambda: scorer.loglikelihoods(pairs), "again": lambda: apart(scorer, pairs)}
  seconds = timing.turns(sides, rounds)
  once = QUESTIONS * (context + 1 + CHOICES * CHOICE)
  every = QUESTIONS * CHOICES * (context + 1 + CHOICE)
  faster = seconds["again"] / seconds["once"]
  return [context, once, every, every / once, seconds["once"], seconds["again"], faster]


def main(contexts: Sequence[int] = CONTEXTS, rounds: int = ROUNDS, path=RESULTS, **sizes) -> None:
  """Prints and writes the table."""
  sizes = dict(vocab_size=4096, width=256, num_layers=5, num_heads=2) | sizes
  cfg = LMConfig(**sizes)
  scorer = scoring.Scorer(LM(cfg, rngs=nnx.Rngs(0)), 0, rows=QUESTIONS)
  rows = [measure(scorer, cfg.vocab_size, context, rounds) for context in contexts]
  columns = ["context", "tokens, once", "tokens, again", "ratio", "s, once", "s, again", "faster"]
  table = tabulate.tabulate(rows, columns, tablefmt="github", floatfmt=".2f", intfmt=",")
  text = (
    f"    python -m benchmarks.scoring_cost\n\n{provenance.machine()}; fp32, {cfg.num_layers}"
    f" layers, width {cfg.width}; {QUESTIONS} questions, {CHOICES} choices of {CHOICE} tokens"
    f" each.\nThe context read once for all choices, and again for each.\n\n{table}\n"
  )
  provenance.write(path, text)
  print(text)


if __name__ == "__main__":
  main()

"""Trains a language model, or goes on training it when the config's workdir holds a checkpoint.

    python -m experiments.main --config=experiments/configs/default.py --config.steps=2000

Exit codes: 0 when the run has ended or was asked to stop, 1 when its numbers were no longer finite,
2 for a mistake in what was asked, with one sentence on stderr.
"""

import sys

from absl import logging

from experiments import allocator, config, train
from experiments.errors import UserError
from experiments.metrics import NotFiniteError


def main(argv: list[str]) -> int:
  """Runs the command line `argv` and returns its exit code."""
  if {"--help", "-h"} & set(argv):
    print(__doc__, "Fields of the default config:", config.parse(argv[:1]), sep="\n")
    return 0
  logging.set_verbosity(logging.WARNING)
  allocator.keep_freed_memory()
  try:
    job = train.prepare(config.parse(argv))
  except (ValueError, FileNotFoundError) as e:
    return _fail(e, 2)
  try:
    train.run(job)
  except UserError as e:
    return _fail(e, 2)
  except NotFiniteError as e:
    return _fail(e, 1)
  return 0


def _fail(error: Exception, code: int) -> int:
  print("error:", " ".join(str(error).split()), file=sys.stderr)
  return code


if __name__ == "__main__":
  sys.exit(main(sys.argv))

"""Our recurrences against the published reference code, operation by operation.

    python -m benchmarks.parity --fla=FOLDER --ttt=FOLDER

FOLDERs are checkouts of github.com/fla-org/flash-linear-attention and of
github.com/test-time-training/ttt-lm-pytorch; without one, its cases are left out. It needs torch
and einops beside this package, which nothing else here does; the reference files are loaded by
their paths, so their packages need not be installed. The cases are parity_cases.py. Writes
results/parity.md, and exits with 1 when a relative l2 error is above 1e-4.
"""

import argparse
import collections
import importlib.metadata
import pathlib
import sys

import jax
import numpy as np
import tabulate

from benchmarks import parity_cases
from experiments import provenance

RESULTS = pathlib.Path(__file__).parent / "results" / "parity.md"
TOLERANCE = 1e-4
COLUMNS = ("mixer", "reference", "function", "shapes", "seed", "outputs", "final state")


def error(got, want) -> float:
  """The largest |got - want| / |want| over two results; nan when one of them is not finite."""
  worst = 0.0
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
      raise ValueError(f"shapes differ: {a.shape} here, {b.shape} in the reference")
    worst = np.maximum(worst, np.linalg.norm(a - b) / np.linalg.norm(b))  # keeps a nan
  return float(worst)


def main(argv: list[str]) -> int:
  """Runs the cases whose folders are given, prints and writes the table; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  for repository in parity_cases.REPOSITORIES:
    parser.add_argument(f"--{repository}", type=pathlib.Path, help="a checkout")
  parser.add_argument("--seeds", type=int, default=3, help="seeds of a case, from 0 on")
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a .md file")
  args = parser.parse_args(argv[1:])
  folders = {name: getattr(args, name) for name in parity_cases.REPOSITORIES}
  rows, worst = [], collections.defaultdict(float)
  for case in parity_cases.CASES:
    if folders[case.repository] is None:
      continue
    try:
      reference = parity_cases.load(folders[case.repository], case)
    except FileNotFoundError as e:
      parser.error(str(e))
    for seed in range(args.seeds):
      shapes, got, want = case.run(reference, np.random.default_rng(seed))
      errors = [error(a, b) for a, b in zip(got, want, strict=True)]
      shown = [f"{e:.1e}" for e in errors] + ["-"] * (2 - len(errors))
      rows.append([case.mixer, case.file, case.function, shapes, seed, *shown])
      worst[case.mixer] = float(np.max([worst[case.mixer], *errors]))
      print(*rows[-1])
  if not rows:
    parser.error("there is nothing to compare: give --fla, --ttt or both")
  failed = [name for name, value in worst.items() if not value <= TOLERANCE]
  verdict = f"above it: {', '.join(failed)}" if failed else "all are within it"
  table = tabulate.tabulate(rows, COLUMNS, "github", disable_numparse=True)
  command = " ".join(f"--{name}=FOLDER" for name, folder in folders.items() if folder)
  references = "".join(
    f"* {name}: {parity_cases.REPOSITORIES[name]}, revision {provenance.revision(root=folder)}\n"
    for name, folder in folders.items()
    if folder
  )
  text = f"""    python -m benchmarks.parity {command}

{provenance.machine()}, torch {importlib.metadata.version("torch")}.
Revision {provenance.revision("trellis_jax", "benchmarks")}. fp32 on both sides.
Relative l2 errors; the bound is {TOLERANCE:.0e}, {verdict}.

{references}
{table}
"""
  provenance.write(args.results, text)
  print(text)
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))

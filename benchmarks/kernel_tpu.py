"""What libtpu's compiler expects of the TPU kernels, on any machine: no number here was measured.

    python -m benchmarks.kernel_tpu

Static estimates (see `benchmarks/tpu_estimate.py`) of each kernel, of the same passes by the XLA
scan over chunks, and the time that moving their inputs and outputs once would take at the chip's
published bandwidth. Writes results/kernel_tpu.jsonl and kernel_tpu.md. `--check` estimates the
first row again and fails where it is more than 5% above the committed table.
"""

import argparse
import json
import pathlib

import jax
import tabulate

from benchmarks import libtpu
from benchmarks.tpu_estimate import Case, estimate
from experiments import provenance

RESULTS = pathlib.Path(__file__).parent / "results" / "kernel_tpu.jsonl"
MOST_WORSE = 1.05  # of what the table holds
# GHz, GB/s; v6e's clock is not published, so it has cycles alone.
CHIPS = {"v5e": (1.5, 819), "v5p": (1.75, 2765)}
SHAPES = (
  Case(),
  Case(C=32),
  Case(C=16, H=64, T=512),
  Case(C=16, T=512),
  Case(H=12),
  Case(D=128, V=128, H=16),
  Case(M=128, H=16),
  Case(dtype="float32", H=16, T=512),
  Case("v5p", B=2),
  Case("v5p", C=16, H=64, B=2, T=512),
  Case("v6e"),
  Case(C=16, H=12, T=512),
  Case("v5p", H=12, B=2),
  Case("v5p", C=16, H=12, B=2, T=512),
  Case(curvature=1.0),
  Case(C=16, H=64, T=512, curvature=1.0),
  Case(H=12, curvature=1.0),
  Case(dtype="float32", H=16, T=512, curvature=1.0),
  Case("v5p", B=2, curvature=1.0),
  Case("v5p", H=12, B=2, curvature=1.0),
)
# Shapes whose XLA scan is estimated, too.
SCANNED = (Case(), Case(C=16, T=512))
# A single token, which is fp32 and the same for every C.
STEPS = tuple(
  Case(chip, "step", D=d, V=d, H=h, B=32, T=1, dtype="float32")
  for chip, d, h in (("v5e", 64, 32), ("v5e", 64, 12), ("v5e", 128, 16), ("v5p", 64, 32))
)


def cases() -> list[Case]:
  """Every program of the table."""
  kernels = [s._replace(what=w) for s in SHAPES for w in ("forward", "saving", "backward")]
  kernels += [s._replace(what=w) for s in SCANNED for w in ("xla_forward", "xla_both")]
  return kernels + list(STEPS)


def committed() -> dict[Case, dict]:
  """The rows of the committed table."""
  rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
  return {Case(**row["case"]): row for row in rows}


def measure(case: Case) -> dict:
  """A row of the table's file."""
  versions = dict(libtpu=libtpu.version(), jax=jax.__version__)
  return dict(case=case._asdict(), **estimate(case), **versions)


def worse(case: Case) -> str | None:
  """Says by how much a case is above the committed table, where that is more than allowed."""
  before, now = committed()[case], measure(case)
  if now["libtpu"] != before["libtpu"]:
    print(f"the table is libtpu {before['libtpu']}'s, here is {now['libtpu']}")
  ratio = now["cycles"] / before["cycles"]
  return f"{case}: {ratio:.3f} times the committed cycles" if ratio > MOST_WORSE else None


def floor(case: Case, both: bool) -> float:
  """ns a head-token takes to move inputs and outputs (and, for both passes, cotangents) once."""
  size = 4 if case.dtype == "float32" else 2
  tokens = 2 * case.D + 2 * case.V + case.M  # q, k, v, alpha and o
  floats = 2  # log_beta, gamma
  moved = (2 * tokens + case.V + 2 * case.D + case.V + case.M) if both else tokens
  return (size * moved + 4 * floats * (3 if both else 1)) / CHIPS[case.chip][1]


def table(rows: dict[Case, dict]) -> str:
  """The table of `kernel_tpu.md`."""
  body = []
  for shape in SHAPES:
    cycles = lambda what: rows.get(shape._replace(what=what), {}).get("cycles")
    once, twice = cycles("forward"), cycles("saving") + cycles("backward")
    per_chunk = [c * shape.C / shape.head_tokens for c in (once, twice)]
    name = f"{shape.chip} C {shape.C}, D {shape.D}, V {shape.V}, M {shape.M}, {shape.dtype}"
    name += f", H {shape.H}" + ", linearised" * (shape.curvature > 0)
    row = [name, *(round(c) for c in per_chunk)]
    if shape.chip in CHIPS:
      ns = lambda c: c / CHIPS[shape.chip][0] / shape.head_tokens
      row += [ns(once), floor(shape, False), ns(twice), floor(shape, True)]
    else:
      row += [None] * 4
    scan = [cycles(w) for w in ("xla_forward", "xla_both")]
    row += [s / c if s else None for s, c in zip(scan, (once, twice))]
    body.append(row)
  columns = ["chip and shape", "cycles / chunk / head: forward", "both", "ns / head-token: forward"]
  columns += ["floor", "both", "floor", "XLA scan / kernels: forward", "both"]
  return tabulate.tabulate(body, columns, tablefmt="github", floatfmt=".2f", missingval="")


def step_table(rows: dict[Case, dict]) -> str:
  """The table of single tokens."""
  body = []
  for case in STEPS:
    ghz, bandwidth = CHIPS[case.chip]
    # The memory and the chunk's start, of keys and of values, each read and written in fp32.
    moved = 4 * 2 * 2 * case.M * (case.D + case.V)
    name = f"{case.chip} D {case.D}, V {case.V}, M {case.M}, H {case.H}, B {case.B}"
    body.append([name, rows[case]["cycles"] / ghz / case.head_tokens, moved / bandwidth])
  columns = ["chip and shape", "ns / head and token", "floor"]
  return tabulate.tabulate(body, columns, tablefmt="github", floatfmt=".0f")


def write_results(rows: dict[Case, dict]) -> None:
  """Prints the table and writes both files."""
  versions = f"libtpu {libtpu.version()}, jax {jax.__version__}"
  text = f"""    python -m benchmarks.kernel_tpu

Static estimates by libtpu's compiler ({versions}).
These are no measurements: nothing has run on a TPU.
"both" is the forward that saves what the backward needs, and the backward. The floor is the bytes
of inputs, outputs and cotangents at the chip's bandwidth. Rows of one chip's program: B 1 (2 on
v5p, whose two cores take a row each), T 1,024 (512 for C 16 and fp32). A program interleaves up to
16 packs of heads (2 heads at C 64, 8 at C 16); with few heads a call of several rows fills it with
rows instead, which the estimator cannot see. Operations of the scan that have no estimate count
as nothing. v6e: cycles alone, its clock is not published.

{table(rows)}

A single token, in fp32. The floor is the bytes of the memories read and written once; at D = V = 64
half of every tile that holds them in HBM is empty, which doubles what is moved.

{step_table(rows)}
"""
  provenance.write(RESULTS, "".join(json.dumps(row) + "\n" for row in rows.values()))
  provenance.write(RESULTS.with_suffix(".md"), text)
  print(text)


def main() -> None:
  """Estimates every row, or checks the first."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--check", action="store_true", help="compares with the committed table")
  if libtpu.library() is None:
    raise SystemExit("libtpu is not installed; see benchmarks/libtpu.py")
  if parser.parse_args().check:
    raise SystemExit(worse(Case()))
  rows = {}
  for case in cases():
    rows[case] = measure(case)
    print(f"{case}: {rows[case]['cycles']} cycles", flush=True)
  write_results(rows)


if __name__ == "__main__":
  main()

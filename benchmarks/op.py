"""Times the op on the accelerator that is here, beside its rivals and the machine's ceilings.

    python -m benchmarks.op

One command for a GPU, a TPU or, with shapes small enough for it, a CPU. Each implementation is
first compared with the definition, values and all gradients, and with the scan at the full shape;
one that is wrong gets no time and the run ends. Times are medians of blocked calls on fresh random
inputs after calls that do not count. The copy bandwidth and the matmul rate are measured in the
same run; the roofline is the larger of the least bytes (inputs, outputs, their gradients) over the
one and the FLOPs over the other. Writes results/op.jsonl and op.md.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tabulate

from benchmarks import op_rivals
from experiments import provenance
from trellis_jax import trellis
from trellis_jax.ops import backends
from trellis_jax.ops.spec import Spec

RESULTS = pathlib.Path(__file__).parent / "results" / "op.jsonl"
# Of outputs and of gradients; with fp32 inputs the products may still be TF32, as JAX's own are.
TOLERANCE = {"float32": (2e-3, 5e-3), "bfloat16": (1e-2, 2e-2)}
READ = 64  # tokens that are read at once, which sets the FLOPs of a chunked form
WARM = 3  # calls that do not count


def _shape(b, t, h, d, m, c, dtype="bfloat16"):
  return dict(B=b, T=t, H=h, D=d, V=d, M=m, C=c, dtype=dtype)


SHAPES = {
  "full": [
    _shape(8, 2048, 12, 64, 64, 64),
    _shape(8, 2048, 12, 64, 64, 16),
    _shape(1, 32768, 12, 64, 64, 64),
    _shape(1, 32768, 12, 64, 64, 16),
    _shape(4, 4096, 16, 128, 64, 64),
  ],
  "small": [_shape(1, 128, 2, 64, 64, c, "float32") for c in (64, 16)],
}


def inputs(shape: dict, seed: int, tokens: int | None = None):
  """Random inputs of the op, of the sizes a trained layer has."""
  rng = np.random.default_rng(seed)
  lead = (shape["B"], tokens or shape["T"], shape["H"])
  normal = lambda *width: rng.standard_normal((*lead, *width), np.float32)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  wide = [unit(normal(shape[n])) for n in "DDV"] + [normal(shape["M"])]
  gates = -0.02 * np.abs(normal()), 1 / (1 + np.exp(-normal())) / shape["C"]
  return (*(jnp.asarray(x, shape["dtype"]) for x in wide), *map(jnp.asarray, gates))


def memory(shape: dict):
  """A memory that is not empty: at zero the first steps are much larger than all later ones."""
  rng = np.random.default_rng(1)
  size = lambda n: (shape["H"], shape["M"], shape[n])
  return tuple(jnp.asarray(0.5 * rng.standard_normal(size(n)), jnp.float32) for n in "DV")


def calls(shape: dict, implementation: str, precision=None) -> tuple[Callable, Callable]:
  """Returns (forward -> o, forward and backward -> (o, gradients)), compiled when first called."""
  start = memory(shape)
  run = dict(chunk_size=shape["C"], implementation=implementation, precision=precision)

  @jax.jit
  def forward(x):
    return trellis(*x, initial_memory=start, **run)[0]

  @jax.jit
  def both(x):
    loss = lambda x: (jnp.sum(jnp.sin(o := forward(x).astype(jnp.float32))), o)
    grads, o = jax.grad(loss, has_aux=True)(x)
    return o, grads

  return forward, both


def distance(x, y) -> float:
  """The largest relative distance of two trees' leaves, in the l2 norm of each leaf."""
  norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32).reshape(-1)))
  pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
  return max(norm(a.astype(jnp.float32) - b.astype(jnp.float32)) / norm(b) for a, b in pairs)


def check(shape: dict, implementation: str) -> tuple[float, float]:
  """Returns the distance from the definition and the scan, of outputs and of gradients.

  Ends the run when one is too large.
  """
  few = {**shape, "B": 1, "H": 2, "T": min(shape["T"], 4 * shape["C"] + 5)}
  worst = [0.0, 0.0]
  for size, truth in ((few, "reference"), (shape, "xla")):
    if implementation == truth:
      continue
    x = inputs(size, seed=7)
    want = calls(size, truth, "highest")[1](x)
    for i, (a, b) in enumerate(zip(calls(size, implementation)[1](x), want)):
      worst[i] = max(worst[i], found := distance(a, b))
      # Not `>`: a NaN is wrong too.
      if not found <= (most := TOLERANCE[shape["dtype"]][i]):
        raise SystemExit(
          f"{implementation}: {('outputs', 'gradients')[i]} are {found:.1e} away from those of "
          f"{truth} at {size}, more than {most:.0e}: no time is given"
        )
  return tuple(worst)


def seconds(call: Callable, fresh: list, rounds: int) -> float:
  """Median seconds of a call that takes each of `fresh` in turn."""
  times = []
  for i in range(WARM + rounds):
    x = jax.block_until_ready(fresh[i % len(fresh)])
    start = time.perf_counter()
    jax.block_until_ready(call(x))
    times.append(time.perf_counter() - start)
  return statistics.median(times[WARM:])


def ceilings(small: bool, rounds: int) -> dict[str, float]:
  """Returns the copy bandwidth in bytes/s, read plus write, and the matmul rate in FLOP/s."""
  count, n = (2**22, 512) if small else (2**29, 8192)
  dtype = jnp.float32 if small else jnp.bfloat16
  keys = jax.random.split(jax.random.key(0), 2)
  flat = [jax.random.normal(k, (count,), dtype) for k in keys]
  square = [jax.random.normal(k, (n, n), dtype) for k in keys]
  copy = seconds(jax.jit(lambda x: x + 1), flat, rounds)
  matmul = seconds(jax.jit(lambda x: x @ x), square, rounds)
  return {
    "copy_bytes_per_second": 2 * flat[0].nbytes / copy,
    "matmul_flops_per_second": 2 * n**3 / matmul,
  }


def work(shape: dict) -> tuple[tuple[float, float], tuple[float, float]]:
  """Returns ((bytes, FLOPs) of the forward, those of forward and backward)."""
  d, v, m = shape["D"], shape["V"], shape["M"]
  heads = shape["B"] * shape["T"] * shape["H"]
  item = jnp.dtype(shape["dtype"]).itemsize
  x, o = (2 * d + v + m) * item + 8, v * item
  flops = 2 * (3 * m * (d + v) + READ * (d + v + 2 * m))
  # The backward reads the inputs and the outputs' gradient again and writes the inputs' gradients.
  return (heads * (x + o), heads * flops), (heads * (3 * x + 2 * o), heads * 3 * flops)


def lines(shape: dict, rounds: int, limits: dict, rivals: dict) -> list[dict]:
  """Returns one line for each implementation and rival at a shape."""
  sizes = backends.Shapes(*(shape[n] for n in "BTHDVM"), shape["dtype"])
  best = backends.choose(None, Spec(chunk_size=shape["C"]).check(), sizes)
  fresh = [inputs(shape, seed) for seed in range(3)]
  found = []
  for name in dict.fromkeys((best, "xla")):
    print(f"{name} at {shape}", file=sys.stderr, flush=True)
    error = dict(zip(("outputs_distance", "gradients_distance"), check(shape, name)))
    times = [seconds(call, fresh, rounds) for call in calls(shape, name)]
    found.append({"op": f"trellis, {name}", **shape, **error, **_times(times)})
  for (bytes_, flops), side in zip(work(shape), ("forward", "both")):
    least = max(bytes_ / limits["copy_bytes_per_second"], flops / limits["matmul_flops_per_second"])
    for line in found:
      line[f"{side}_roofline"] = least / line[f"{side}_seconds"]
  for name, make in rivals.items():
    print(f"{name} at {shape}", file=sys.stderr, flush=True)
    times = op_rivals.seconds(functools.partial(make), shape, rounds)
    found.append({"op": name, **shape, **_times(times)})
  return found


def _times(times) -> dict[str, float]:
  return dict(zip(("forward_seconds", "both_seconds"), times))


def report(found: list[dict], limits: dict, notes: list[str], command: str, machine: str) -> str:
  """The text of op.md."""
  columns = ["op", *"BTHDVMC", "dtype", "forward ms", "of roofline", "with backward ms"]
  columns += ["of roofline", "M tokens/s", "distance of o", "of gradients"]
  rows = []
  for line in found:
    part = lambda key, scale, text, line=line: (
      format(scale * line[key], text) if key in line else "-"
    )
    rows.append(
      [line["op"], *(line[n] for n in "BTHDVMC"), line["dtype"]]
      + [part("forward_seconds", 1e3, ".3f"), part("forward_roofline", 100, ".0f") + "%"]
      + [part("both_seconds", 1e3, ".3f"), part("both_roofline", 100, ".0f") + "%"]
      + [
        f"{line['B'] * line['T'] / line['both_seconds'] / 1e6:.2f}",
        part("outputs_distance", 1, ".0e"),
      ]
      + [part("gradients_distance", 1, ".0e")]
    )
  table = tabulate.tabulate(rows, columns, "github", disable_numparse=True)
  return f"""    {command}

{machine}. Copy {limits["copy_bytes_per_second"] / 1e9:,.0f} GB/s (read plus write), matmul
{limits["matmul_flops_per_second"] / 1e12:,.2f} TFLOP/s, in the same run. Tokens per second with
backward. Distance: from the definition and from the scan.
{"".join(f"{note}. " for note in notes)}

{table}
"""


def main(argv: list[str]) -> None:
  """Measures, prints and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument("--shapes", choices=list(SHAPES), help="by default small on a CPU, else full")
  parser.add_argument("--rounds", type=int, default=20, help="calls that count")
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a .jsonl file")
  args = parser.parse_args(argv[1:])
  small = args.shapes == "small" or (args.shapes is None and jax.default_backend() == "cpu")
  rivals, notes = op_rivals.available()
  limits = ceilings(small, args.rounds)
  machine = provenance.machine()
  found = []
  for shape in SHAPES["small" if small else "full"]:
    found += lines(shape, args.rounds, limits, rivals)
  origin = {
    "machine": machine,
    "revision": provenance.revision("trellis_jax", "pallas_kernels", "benchmarks"),
    **limits,
  }
  command = " ".join(["python -m benchmarks.op", *argv[1:]])
  text = report(found, limits, notes, command, f"{machine}; revision {origin['revision']}")
  provenance.write(args.results, "".join(json.dumps({**x, **origin}) + "\n" for x in found))
  provenance.write(args.results.with_suffix(".md"), text)
  print(text)


if __name__ == "__main__":
  main(sys.argv)

"""Times the op on the accelerator that is here, beside its rivals and the machine's ceilings.

    python -m benchmarks.op

One command for a GPU, a TPU or, with shapes small enough for it, a CPU. Each implementation is
first compared with the definition, values and all gradients, and with the scan at the full shape,
and called twice on the same inputs: one that is wrong, or not the same to the bit, gets no time and
the run ends. Times are those of the device's own kernels, summed, where its profiler tells, and
medians of blocked calls on fresh random inputs, which have the host's dispatch in them. The copy
bandwidth and the matmul rate are measured in the same run; the roofline is the larger of the least
bytes (inputs, outputs, their gradients) over the one and the FLOPs over the other. Writes
results/op.jsonl and op.md.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tabulate

from benchmarks import device_time, op_rivals
from experiments import provenance
from trellis_jax import trellis
from trellis_jax.ops import backends
from trellis_jax.ops.spec import Spec

RESULTS = pathlib.Path(__file__).parent / "results" / "op.jsonl"
# Of outputs and of gradients; with fp32 inputs the products may still be TF32, as JAX's own are.
TOLERANCE = {"float32": (2e-3, 5e-3), "bfloat16": (1e-2, 2e-2)}
READ = 64  # tokens that are read at once, which sets the FLOPs of a chunked form
WARM = 3  # calls that do not count
SLOW = 0.1  # seconds from which on three calls are enough
SIDES = ("forward", "both")  # both: forward and backward
CHUNKS = ((64, 1.0), (64, 0.0), (16, 0.0))  # C and the curvature: linearised and stale


def _shapes(b, t, h, d, m, dtype="bfloat16"):
  sizes = dict(B=b, T=t, H=h, D=d, V=d, M=m, dtype=dtype)
  return [dict(sizes, C=c, curvature=curvature) for c, curvature in CHUNKS]


SHAPES = {
  "full": [
    *_shapes(8, 2048, 12, 64, 64),
    *_shapes(1, 32768, 12, 64, 64),
    *_shapes(4, 4096, 16, 128, 64),
  ],
  "small": _shapes(1, 128, 2, 64, 64, "float32"),
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
  run = dict(chunk_size=shape["C"], curvature=shape["curvature"], precision=precision)
  run |= dict(implementation=implementation)

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


class Checks:
  """How far implementations are from the definition and the scan; each comparison is made once.

  A few rows of a few tokens are compared with the definition, once for all batches and lengths; the
  whole shape with the scan.
  """

  def __init__(self):
    self._distances: dict[tuple, tuple[float, ...]] = {}
    self._truths: dict[str, tuple] = {}  # by name: the last size, and what it gave

  def check(self, shape: dict, implementation: str) -> tuple[float, ...]:
    """Returns the larger distances of outputs and of gradients; ends the run with one too large."""
    few = {**shape, "B": 1, "H": 2, "T": min(shape["T"], 4 * shape["C"] + 5)}
    found = [self._of(few, implementation, "reference")]
    if implementation != "xla":
      found.append(self._of(shape, implementation, "xla"))
    return tuple(map(max, zip(*found)))

  def _of(self, size: dict, implementation: str, truth: str) -> tuple[float, ...]:
    key = implementation, *size.items()
    if key not in self._distances:
      self._distances[key] = self._measure(size, implementation, truth)
    return self._distances[key]

  def _measure(self, size: dict, implementation: str, truth: str) -> tuple[float, ...]:
    x = inputs(size, seed=7)
    if self._truths.get(truth, (None,))[0] != size:
      self._truths[truth] = size, calls(size, truth, "highest")[1](x)
    want = self._truths[truth][1]
    both = calls(size, implementation)[1]
    got = both(x)
    if not all(map(jnp.array_equal, jax.tree.leaves(got), jax.tree.leaves(both(x)))):
      raise SystemExit(f"{implementation}: two calls at {size} differ: no time is given")
    found = tuple(distance(a, b) for a, b in zip(got, want))
    for name, far, most in zip(("outputs", "gradients"), found, TOLERANCE[size["dtype"]]):
      if not far <= most:  # not `>`: a NaN is wrong too
        raise SystemExit(
          f"{implementation}: {name} are {far:.1e} away from those of {truth} at {size}, more than "
          f"{most:.0e}: no time is given"
        )
    return found


def seconds(call: Callable, fresh: list, rounds: int) -> float:
  """Median seconds of a call that takes each of `fresh` in turn."""
  times = []
  for i in range(WARM + rounds):
    x = jax.block_until_ready(fresh[i % len(fresh)])
    start = time.perf_counter()
    jax.block_until_ready(call(x))
    times.append(time.perf_counter() - start)
    if len(times) > WARM + 2 and times[-1] > SLOW:
      break
  return statistics.median(times[WARM:])


def kernels_of(call: Callable, x, rounds: int) -> dict[str, float]:
  """Seconds of the device's own kernels in a call, longest first; empty where no profiler tells."""
  kernels = device_time.by_kernel(lambda: call(x), min(rounds, 5))
  return dict(sorted(kernels.items(), key=lambda x: -x[1]))


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


def lines(
  shape: dict, rounds: int, limits: dict, checks: Checks, names: Sequence[str] = ()
) -> Iterator[dict]:
  """Yields a line for each implementation at a shape, as it ends; of all where names are none."""
  sizes = backends.Shapes(*(shape[n] for n in "BTHDVM"), shape["dtype"])
  spec = Spec(chunk_size=shape["C"], curvature=shape["curvature"]).check()
  best = backends.choose(None, spec, sizes)
  fresh = [inputs(shape, seed) for seed in range(3)]
  for name in dict.fromkeys((best, "xla")):
    if names and name not in names:
      continue
    print(f"{name} at {shape}", file=sys.stderr, flush=True)
    error = dict(zip(("outputs_distance", "gradients_distance"), checks.check(shape, name)))
    sides = calls(shape, name)
    blocked = [seconds(call, fresh, rounds) for call in sides]
    kernels = [kernels_of(call, fresh[0], rounds) for call in sides]
    device = [sum(x.values()) or None for x in kernels]
    line = {"op": f"trellis, {name}", **shape, **error, **_times(blocked, device)}
    if name != "xla" and kernels[1]:
      line["kernels"] = {k: float(f"{x:.4g}") for k, x in kernels[1].items()}
    for (bytes_, flops), side in zip(work(shape), SIDES):
      rates = limits["copy_bytes_per_second"], limits["matmul_flops_per_second"]
      line[f"{side}_roofline"] = max(bytes_ / rates[0], flops / rates[1]) / spent(line, side)
    yield line


def _times(blocked, device) -> dict[str, float]:
  known = {f"{side}_device_seconds": x for side, x in zip(SIDES, device) if x is not None}
  return {f"{side}_seconds": x for side, x in zip(SIDES, blocked)} | known


def spent(line: dict, side: str) -> float:
  """Seconds of the device's kernels where they are known, else of the blocked call."""
  return line.get(f"{side}_device_seconds", line[f"{side}_seconds"])


def report(found: list[dict], limits: dict, notes: list[str], command: str, machine: str) -> str:
  """The text of op.md."""
  columns = ["op", *"BTHDVM", "chunks", "forward ms", "of roofline", "with backward ms"]
  columns += ["of roofline", "blocked ms", "M tokens/s", "distance of o", "of gradients"]
  rows = []
  for line in found:
    part = lambda key, scale, text, line=line: (
      format(scale * line[key], text) if key in line else "-"
    )
    row = [line["op"], *(line[n] for n in "BTHDVM")]
    kind = "linearised" if line.get("curvature") else "stale"
    row.append(f"{line['C']} {kind}" if "C" in line else "-")
    for side in SIDES:
      row.append(f"{1e3 * spent(line, side):.3f}")
      row.append(part(f"{side}_roofline", 100, ".0f") + "%" * (f"{side}_roofline" in line))
    row.append(part("both_seconds", 1e3, ".3f"))
    row.append(f"{line['B'] * line['T'] / spent(line, 'both') / 1e6:.2f}")
    row += [part(f"{of}_distance", 1, ".0e") for of in ("outputs", "gradients")]
    rows.append(row)
  table = tabulate.tabulate(rows, columns, "github", disable_numparse=True)
  dtypes = " and ".join(sorted({line["dtype"] for line in found}))
  timed = "Times are sums of the device's kernels"
  if not any("both_device_seconds" in line for line in found):
    timed = "Times are blocked calls, for no profiler told of a device"
  return f"""    {command}

{machine}. Operands are {dtypes}. Copy {limits["copy_bytes_per_second"] / 1e9:,.0f} GB/s (read plus
write), matmul {limits["matmul_flops_per_second"] / 1e12:,.2f} TFLOP/s, in the same run. {timed};
"blocked" is forward and backward by the host's clock. Tokens per second with backward. Distance:
from the definition and from the scan; two calls gave the same to the bit.
{"".join(f"{note}. " for note in notes)}

{table}
"""


def main(argv: list[str]) -> None:
  """Measures, prints and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument("--shapes", choices=list(SHAPES), help="by default small on a CPU, else full")
  parser.add_argument("--rounds", type=int, default=20, help="calls that count")
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a .jsonl file")
  names = ["xla", *backends.kernels(), "rivals"]
  parser.add_argument("--only", action="append", default=[], choices=names, help="by default all")
  parser.add_argument("--limit", type=float, default=op_rivals.LIMIT, help="seconds of a rival")
  args = parser.parse_args(argv[1:])
  small = args.shapes == "small" or (args.shapes is None and jax.default_backend() == "cpu")
  rivals, notes = op_rivals.available()
  limits = ceilings(small, args.rounds)
  origin = {
    "machine": provenance.machine(),
    "revision": provenance.revision("trellis_jax", "pallas_kernels", "benchmarks"),
    **limits,
  }
  command = " ".join(["python -m benchmarks.op", *argv[1:]])
  about = f"{origin['machine']}; revision {origin['revision']}"
  found, checks = [], Checks()

  def keep(line):
    # After every line: whoever is stopped keeps what is there.
    found.append({**line, **origin})
    provenance.write(args.results, "".join(json.dumps(x) + "\n" for x in found))
    text = report(found, limits, notes, command, about)
    provenance.write(args.results.with_suffix(".md"), text)

  timed = []
  for shape in SHAPES["small" if small else "full"]:
    if not args.only or set(args.only) - {"rivals"}:
      for line in lines(shape, args.rounds, limits, checks, args.only):
        keep(line)
    sizes = {k: v for k, v in shape.items() if k not in ("C", "curvature")}
    if sizes in timed or (args.only and "rivals" not in args.only):
      continue
    timed.append(sizes)
    for name in rivals:
      print(f"{name} at {sizes}", file=sys.stderr, flush=True)
      times, note = op_rivals.times(name, sizes, args.rounds, args.limit)
      notes += [note] * bool(note and note not in notes)
      if times:
        keep({"op": name, **sizes, **times})
  text = report(found, limits, notes, command, about)
  provenance.write(args.results.with_suffix(".md"), text)
  print(text)


if __name__ == "__main__":
  main(sys.argv)

"""libtpu's static estimate of one program's cycles on a TPU that is not there.

    python -m benchmarks.tpu_estimate '{"chip": "v5e", "what": "forward"}'

libtpu compiles the program, walks the compiled schedule with the loops unrolled and the transfers
modelled, and writes the cycles of every operation. Nothing is executed, nothing is measured. It
takes reads and writes of HBM for independent, so the floor of bytes is to be looked at besides.
Prints {"cycles": ..., "operations": ..., "estimated": ...} for one `Case`; the last two count the
operations of the program's loops and those of them that have an estimate.
"""

import functools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

from benchmarks import libtpu
from experiments import provenance

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Flags of libtpu; without the second its estimator stops at products of masked bfloat16.
DUMP = "--xla_jf_dump_static_llo_profile_to="
FLAGS = ("--xla_tpu_check_llo_types=false",)


class Case(NamedTuple):
  """One program: `what` is "forward", "saving" (what a backward needs, too), "backward", "step" (a
  single token, T 1), or these of the scan over chunks: "xla_forward", "xla_both"."""

  chip: str = "v5e"
  what: str = "forward"
  C: int = 64
  D: int = 64
  V: int = 64
  M: int = 64
  H: int = 32
  B: int = 1
  T: int = 1024
  dtype: str = "bfloat16"
  curvature: float = 0.0

  @property
  def head_tokens(self) -> int:
    return self.B * self.T * self.H


def estimate(case: Case) -> dict:
  """Returns what the module prints, from a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    done = subprocess.run(
      [sys.executable, "-m", "benchmarks.tpu_estimate", json.dumps(case._asdict()), folder],
      env=libtpu.environment(DUMP + folder, *FLAGS),
      cwd=provenance.ROOT,
      capture_output=True,
      text=True,
    )
  if done.returncode:
    raise RuntimeError(f"{case}: {done.stderr[-500:]}")
  return json.loads(done.stdout)


def _program(case: Case, place):
  """Returns (function, its arguments' shapes)."""
  import jax
  import jax.numpy as jnp

  from pallas_kernels import _tpu_backward, _tpu_forward, _tpu_plan, _tpu_step, mosaic_tpu
  from trellis_jax.ops import chunked
  from trellis_jax.ops.spec import Spec

  spec = Spec(chunk_size=case.C, curvature=case.curvature).check()
  b, t, h, m, widths = case.B, case.T, case.H, case.M, (case.D, case.V)
  low = lambda w: place((b, t, h, w), case.dtype)
  gate = place((b, t, h), "float32")
  x = chunked.Inputs(low(case.D), low(case.D), low(case.V), low(m), gate, gate)
  start = tuple(place((b, h, m, w), "float32") for w in widths)
  init = tuple(place((h, m, w), "float32") for w in widths)
  last = place((b,), "int32")
  if case.what == "step":
    row = lambda *size: place((b, h, *size), "float32")
    # Flags and gates as the kernel takes them: the estimator knows no transfers of what XLA made.
    args = place((4 * b,), "int32"), place((2 * b * h,), "float32")
    args += tuple(map(row, (case.D, case.D, case.V, m))) + (start, start, init)
    return functools.partial(_tpu_step.call, spec), args
  if case.what.startswith("xla"):

    def run(x, start, init, last, cts):
      rows = chunked.Rows(None, last)
      *out, saved = chunked.forward(spec, x, start, init, rows, case.what == "xla_both")
      if case.what == "xla_forward":
        return out
      return out[0], chunked.backward(spec, x, start, init, rows, saved, (cts, *out[1:]))

    return run, (x, start, init, last, low(case.V))

  back = case.what == "backward"
  plan = _tpu_plan.make(spec, x, *(_tpu_backward if back else _tpu_forward).SIZE[case.C])

  def arrays(x, start, init):
    gates = mosaic_tpu.kernel_gates(plan, x.log_beta, x.gamma, None)
    return mosaic_tpu.kernel_arrays(plan, x, gates, start, init)

  put = lambda tree: jax.tree.map(lambda a: place(a.shape, a.dtype), tree)
  arrays = put(jax.eval_shape(arrays, x, start, init))
  if not back:
    call = lambda a, last: _tpu_forward.call(plan, spec, a, last, case.what == "saving")
    return call, (arrays, last)
  rows = plan.chunks * m
  saved = tuple(place((b, rows, plan.heads[1] * w), jnp.dtype(plan.operand)) for w in widths)
  cts = arrays[0][2], arrays[3], arrays[3]
  call = lambda a, last, saved, cts: _tpu_backward.call(plan, spec, a, last, saved, cts)
  return call, (arrays, last, saved, cts)


def _compiled(case: Case) -> str:
  """Compiles; returns the optimised program."""
  import jax
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[case.chip])
  mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
  sharding = NamedSharding(mesh, PartitionSpec())
  place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  function, args = _program(case, place)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(function).lower(*args).compile().as_text()


def _times_run(program: str) -> dict[str, int]:
  """How often every operation of an optimised program runs.

  JAX's scans count from 0, so a loop's trips are the constant that its condition compares with.
  """
  inside, operations, bounds, loops = "", {}, {}, {}
  for line in program.splitlines():
    if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
      inside = head.group(1)
    elif op := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
      operations[op.group(1)] = inside
      if bound := re.search(r" s32\[\]\S* constant\((\d+)\)", line):
        bounds[inside] = int(bound.group(1))
      if loop := re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
        loops[loop.group(2)] = (inside, loop.group(1))

  def count(computation):
    if computation not in loops:
      return 1
    parent, condition = loops[computation]
    return bounds[condition] * count(parent)

  return {op: count(computation) for op, computation in operations.items()}


def main() -> None:
  """Compiles the case named on the command line, and prints its cycles."""
  case, folder = Case(**json.loads(sys.argv[1])), pathlib.Path(sys.argv[2])
  times = _times_run(_compiled(case))
  total = estimated = 0
  for file in folder.glob("*.textproto"):
    name = file.name.split("_TPU")[0]
    if name in times and (case.what.startswith("xla") or name.startswith("trellis_")):
      cycles = re.findall(r"^\s*estimated_cycles: (\d+)", file.read_text(), re.M)
      total += times[name] * sum(map(int, cycles))
      estimated += 1
  looped = sum(n > 1 for n in times.values())
  print(json.dumps(dict(cycles=total, operations=looped, estimated=estimated)))


if __name__ == "__main__":
  main()

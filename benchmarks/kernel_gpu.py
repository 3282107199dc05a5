"""What the GPU kernels take of a Hopper's registers and shared memory, on any machine.

    python -m benchmarks.kernel_gpu

Needs the `triton` package (3.6.0, from PyPI), which carries NVIDIA's assembler, and no GPU: the
op's gradient is lowered for CUDA, the Triton IR of every kernel compiled for sm_90a. Writes
results/kernel_gpu.jsonl and kernel_gpu.md. `--check N` compiles the first N shapes and compares
with the committed table.
"""

import argparse
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tabulate
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from experiments import provenance
from trellis_jax import trellis

RESULTS = pathlib.Path(__file__).parent / "results" / "kernel_gpu.jsonl"
ARCH, CAPABILITY = "sm_90a", 90
WIDTHS, SLOTS, CHUNKS = (64, 128), (64, 32, 128), (64, 32, 16)
MOST_WORSE = 1.05  # of what the table holds
COUNTS = ("registers", "shared_bytes", "spill_bytes", "instructions")


class Shape(NamedTuple):
  """A shape that the kernels support.

  restarts: whether rows hold several segments; linearised: whether chunks have a curvature.
  """

  D: int = 64
  V: int = 64
  M: int = 64
  C: int = 64
  dtype: str = "bfloat16"
  restarts: bool = False
  linearised: bool = False


class Kernel(NamedTuple):
  """A launch in a lowered program: its Triton IR and how it is to be compiled."""

  name: str
  ir: str
  warps: int
  stages: int


def shapes() -> Iterator[Shape]:
  """Every supported shape in bf16; the squares with restarts, in fp32, and in fp32 with both.

  Then those squares with linearised chunks.
  """
  for m in SLOTS:
    for d in WIDTHS:
      for v in WIDTHS:
        yield from (Shape(d, v, m, c) for c in CHUNKS)
  rest = ("bfloat16", True), ("float32", False), ("float32", True)
  for dtype, restarts in rest:
    for d in WIDTHS:
      yield from (Shape(d, d, d, c, dtype, restarts) for c in CHUNKS)
  for dtype, restarts in (("bfloat16", False), *rest):
    for d in WIDTHS:
      yield from (Shape(d, d, d, c, dtype, restarts, linearised=True) for c in CHUNKS)


def mesh(*axes: tuple[str, int], kind=AxisType.Explicit) -> AbstractMesh:
  """Returns a mesh of GPUs that are not there, over which programs can be lowered; one by default.

  Args:
    axes: (name, size) of each.
    kind: of all axes.
  """
  names, sizes = zip(*(axes or (("data", 1),)))
  device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
  return AbstractMesh(sizes, names, (kind,) * len(names), abstract_device=device)


def lower(shape: Shape, tokens: int = 2048):
  """Returns the lowered program of the op's value and gradient at a shape."""
  b, t, h = 8, tokens, 12
  array = lambda *size, dtype=shape.dtype: jax.ShapeDtypeStruct(size, dtype)
  x = tuple(array(b, t, h, n) for n in (shape.D, shape.D, shape.V, shape.M))
  x += (array(b, t, h, dtype="float32"),) * 2
  segments = array(b, t, dtype="int32") if shape.restarts else None

  def loss(x, segments):
    run = dict(segment_ids=segments, chunk_size=shape.C, curvature=float(shape.linearised))
    return jnp.sum(trellis(*x, **run, implementation="triton_gpu")[0].astype(jnp.float32) ** 2)

  with jax.sharding.use_abstract_mesh(mesh()):
    traced = jax.jit(jax.value_and_grad(loss)).trace(x, segments)
    return traced.lower(lowering_platforms=("cuda",))


def kernels(lowered) -> list[Kernel]:
  """Returns the Triton kernels of a lowered program, in order."""
  from jax._src.interpreters import mlir
  from jax._src.lib.mlir import ir
  from jaxlib.triton import dialect

  found = []

  def decode(config) -> Kernel:
    context = mlir.make_ir_context()
    dialect.register_dialect(context)
    context.allow_unregistered_dialects = True
    with context, ir.Location.unknown():
      module = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes)
      text = module.operation.get_asm(enable_debug_info=False)
    number = lambda key: ir.IntegerAttr(config[key]).value
    name = ir.StringAttr(config["name"]).value
    return Kernel(name, text, number("num_warps"), number("num_stages"))

  def walk(op):
    for region in op.regions:
      for block in region.blocks:
        for inner in block.operations:
          attributes = inner.operation.attributes
          if "call_target_name" in attributes and "triton" in str(attributes["call_target_name"]):
            found.append(decode(attributes["mhlo.backend_config"]))
          walk(inner.operation)

  walk(lowered.compiler_ir("stablehlo").operation)
  return found


def compiled(kernel: Kernel) -> dict[str, int]:
  """Returns the COUNTS of one kernel, as NVIDIA's assembler gives them."""
  import triton
  from triton.backends.compiler import GPUTarget

  tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
  with tempfile.TemporaryDirectory() as folder:
    source, ptx, cubin = (
      pathlib.Path(folder) / f"kernel.{end}" for end in ("ttir", "ptx", "cubin")
    )
    source.write_text(kernel.ir)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    done = triton.compile(str(source), target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    ptx.write_text(done.asm["ptx"])
    run = lambda *args: subprocess.run(args, capture_output=True, text=True, check=True)
    said = run(tools / "ptxas", "-v", f"-arch={ARCH}", ptx, "-o", cubin).stderr
    code = run(tools / "nvdisasm", "-c", cubin).stdout
  number = lambda pattern: int(re.search(pattern, said).group(1))
  return {
    "registers": number(r"Used (\d+) registers"),
    "shared_bytes": done.metadata.shared,
    "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
    "instructions": len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
  }


def lines(wanted: list[Shape]) -> list[dict[str, Any]]:
  """Returns a line for each kernel of each shape; one that two shapes share is compiled once."""
  known, found = {}, []
  for i, shape in enumerate(wanted):
    print(f"{i + 1} of {len(wanted)}: {shape}", file=sys.stderr, flush=True)
    jax.clear_caches()
    launches = kernels(lower(shape))
    if shape == Shape(shape.D, shape.V, shape.M):
      launches += kernels(lower(shape, tokens=1))  # the same for every chunk and dtype
    for kernel in launches:
      key = hashlib.sha256(repr(kernel).encode()).hexdigest()
      if key not in known:
        known[key] = compiled(kernel)
        if known[key]["spill_bytes"]:
          print(f"  {kernel.name} spills: {known[key]}", file=sys.stderr, flush=True)
      launch = {"kernel": kernel.name, "warps": kernel.warps, "stages": kernel.stages}
      found.append({**shape._asdict(), **launch, **known[key]})
  return found


def same(x: dict, y: dict) -> bool:
  """Whether two lines are of one kernel at one shape."""
  return all(x[key] == y[key] for key in (*Shape._fields, "kernel"))


def worse(found: list[dict], table: list[dict]) -> list[str]:
  """Returns a sentence for each count that is more than 5% above the committed table."""
  said = []
  for line in found:
    before = next((old for old in table if same(line, old)), None)
    if before is None:
      said.append(f"{line['kernel']} has no row at {Shape(*(line[k] for k in Shape._fields))}")
      continue
    for count in COUNTS:
      if line[count] > MOST_WORSE * before[count]:
        shape = Shape(*(line[k] for k in Shape._fields))
        said.append(f"{line['kernel']} at {shape}: {count} {line[count]}, was {before[count]}")
  return said


def report(found: list[dict], command: str, versions: str) -> str:
  """The text of kernel_gpu.md."""
  columns = ["kernel", *"DVMC", "dtype", "restarts", "linearised", "warps", "registers"]
  columns += ["shared KiB", "spilt bytes", "instructions"]
  rows = [
    [x["kernel"], *(x[n] for n in "DVMC"), x["dtype"]]
    + ["yes" if x[n] else "no" for n in ("restarts", "linearised")]
    + [x["warps"], x["registers"], f"{x['shared_bytes'] / 1024:.0f}"]
    + [x["spill_bytes"], x["instructions"]]
    for x in found
  ]
  table = tabulate.tabulate(rows, columns, "github", disable_numparse=True)
  spilt = [x for x in found if x["spill_bytes"]]
  clean = "No kernel spills."
  if spilt:
    traits = lambda x: " with restarts" * x["restarts"] + ", linearised" * x["linearised"]
    at = lambda x: "{dtype}{}, D {D}, V {V}, M {M}".format(traits(x), **x)
    where = "; ".join(dict.fromkeys(map(at, spilt)))
    clean = f"{len(spilt)} of {len(found)} rows spill: {where}."
  return f"""    {command}

{versions}. What the compiler says, not a measurement.
Registers are per thread (of 255), shared memory per program (of 227 KiB), spilt bytes are stores
plus loads. {clean}

{table}
"""


def main(argv: list[str]) -> None:
  """Compiles, prints and writes the table, or checks it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument("--check", type=int, metavar="N", help="compare the first N shapes only")
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a .jsonl file")
  args = parser.parse_args(argv[1:])
  try:
    import triton
  except ImportError:
    raise SystemExit(
      "the kernels are compiled with triton, which is not installed; `pip install triton==3.6.0`"
    ) from None
  wanted = list(shapes())
  if args.check is not None:
    table = [json.loads(line) for line in args.results.read_text().splitlines()]
    said = worse(lines(wanted[: args.check]), table)
    raise SystemExit("\n".join(said) if said else 0)
  found = lines(wanted)
  versions = f"jax {jax.__version__}, triton {triton.__version__}, {ARCH}"
  command = " ".join(["python -m benchmarks.kernel_gpu", *argv[1:]])
  text = report(found, command, versions)
  origin = {"jax": jax.__version__, "triton": triton.__version__}
  provenance.write(args.results, "".join(json.dumps({**x, **origin}) + "\n" for x in found))
  provenance.write(args.results.with_suffix(".md"), text)
  print(text)


if __name__ == "__main__":
  main(sys.argv)

"""Times a training step of the 125M model on the accelerator that is here, and where it goes.

    python -m benchmarks.train_step

The model, optimiser and step are those of the paper's 125M rows (experiments/configs/paper), in
bfloat16, on one device and without rematerialisation; tokens are random, a row of the batch is one
document or, where the model's name says so, four that the op has to tell apart. Each step is timed
as blocked calls after ones that do not count, and once more under the profiler, which tells the
share of the op's kernels. Writes results/train_step.jsonl and train_step.md.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tabulate
from flax import nnx

from benchmarks import device_time
from experiments import config, optim, provenance
from experiments import step as step_lib
from experiments.configs.paper import base
from trellis_jax import LM

RESULTS = pathlib.Path(__file__).parent / "results" / "train_step.jsonl"
WARM, ROUNDS = 2, 6
OP = "trellis_"  # what the names of the op's kernels begin with
MOST_NAMED = 40  # kernels that a line names besides the op's


class Row(NamedTuple):
  """A model: its mixer with knobs, other fields of it, and whether a row holds four documents."""

  name: str
  mixer: str = "trellis"
  knobs: Mapping[str, Any] = types.MappingProxyType({})
  model: Mapping[str, Any] = types.MappingProxyType({})
  packed: bool = False


ROWS = (
  Row("trellis, linearised chunks of 64"),
  Row("trellis, linearised, layers not scanned", model=dict(scan_layers=False)),
  Row("trellis, linearised, packed documents", packed=True),
  Row("attention", "attention"),
  Row("gated_delta_net", "gated_delta_net"),
  Row("trellis, stale chunks of 64", knobs=dict(curvature=0.0)),
  Row("trellis, stale chunks of 16", knobs=dict(curvature=0.0, chunk_size=16)),
)
SIZES = {  # size, rows of the batch, T
  "full": ("125m", 8, 2048),
  "small": ("mini", 2, 128),
}


def program(row: Row, size: str, rows: int, tokens: int):
  """Returns (the compiled step, state, batch) of a row; the step gives its state away."""
  cfg = base.row({"model": row.mixer}, size, row.mixer, tokens, **row.knobs).config
  cfg.model.remat = "none"
  cfg.model.update(dict(row.model))
  vocab = base.SIZES[size].vocab_size
  lm_config = config.lm_config(cfg.model, vocab)
  optimizer = optim.optimizer(cfg.optim, cfg.steps)
  make = lambda: LM(lm_config, rngs=nnx.Rngs(0))
  graphdef, _ = nnx.split(nnx.eval_shape(make), nnx.Param)
  sums_fn = step_lib.loss_fn(graphdef, z_loss=cfg.optim.z_loss, batch_shards=1)
  schedule = optim.schedule(cfg.optim, cfg.steps)

  def update(state, batch):
    return step_lib.train_step(
      state, batch, sums_fn=sums_fn, optimizer=optimizer, schedule=schedule
    )

  state = jax.jit(lambda: step_lib.init_state(make, optimizer))()
  ids = jax.random.randint(jax.random.key(1), (rows, tokens + 1), 0, vocab)
  one = jnp.ones((rows, tokens), jnp.int32)
  batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": one.astype(jnp.float32)}
  if row.packed:
    batch["segment_ids"] = 1 + jnp.arange(tokens) * 4 // tokens + 0 * one
  return jax.jit(update, donate_argnums=0).lower(state, batch).compile(), state, batch


def line(row: Row, size: str, rows: int, tokens: int) -> dict[str, Any]:
  """What is measured of a row."""
  print(row.name, file=sys.stderr, flush=True)
  update, state, batch = program(row, size, rows, tokens)
  count = sum(x.size for x in jax.tree.leaves(state.params))
  times = []

  def call():
    nonlocal state
    state, metrics = update(state, batch)
    return metrics

  for _ in range(WARM + ROUNDS):
    start = time.perf_counter()
    metrics = jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  if not jnp.isfinite(metrics["loss"] + metrics["grad_norm"]):
    raise SystemExit(
      f"{row.name}: loss {metrics['loss']}, gradient {metrics['grad_norm']}: no time"
    )
  seconds = statistics.median(times[WARM:])
  found = {"row": row.name, "size": size, "B": rows, "T": tokens, "parameters": count}
  found |= {"step_seconds": seconds, "tokens_per_second": rows * tokens / seconds}
  found["temporary_bytes"] = update.memory_analysis().temp_size_in_bytes
  kernels = device_time.by_kernel(call, 3)
  if kernels:
    most = sorted(kernels.items(), key=lambda x: -x[1])[:MOST_NAMED]
    mine = [(k, x) for k, x in kernels.items() if k.startswith(OP)]
    found["device_seconds"] = sum(kernels.values())
    found["op_seconds"] = sum(x for _, x in mine)
    found["kernels"] = {k: float(f"{x:.4g}") for k, x in [*most, *mine]}
  return found


def report(found: list[dict], command: str, machine: str) -> str:
  """The text of train_step.md."""
  columns = ["model", "parameters", "step ms", "k tokens/s", "kernels ms", "of the op", "share"]
  columns.append("temporary GB")
  rows = []
  for x in found:
    op, device = x.get("op_seconds"), x.get("device_seconds")
    ms = lambda seconds: "-" if not seconds else f"{1e3 * seconds:.1f}"
    rows.append([x["row"], f"{x['parameters'] / 1e6:.1f}M", ms(x["step_seconds"])])
    rows[-1] += [f"{x['tokens_per_second'] / 1e3:.0f}", ms(device), ms(op)]
    memory = x.get("temporary_bytes")
    rows[-1].append(f"{op / device:.0%}" if op else "-")
    rows[-1].append(f"{memory / 1e9:.1f}" if memory else "-")
  known = {x["row"] for x in found}
  missing = [row.name for row in ROWS if row.name not in known]
  rows += [[name, *["not run"] * (len(columns) - 1)] for name in missing]
  table = tabulate.tabulate(rows, columns, "github", disable_numparse=True)
  some = found[0]
  return f"""    {command}

{machine}. A step of the {some["size"]} model with {some["B"]} rows of {some["T"]} tokens on one
device, without rematerialisation. "Kernels" is what the profiler sums of a step, "of the op"
those of `pallas_kernels`; XLA runs the other mixers, attention too. The lines name the longest
kernels and those of the op.

{table}
"""


def main(argv: list[str]) -> None:
  """Measures, prints and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument("--size", choices=list(SIZES), help="by default small on a CPU, else full")
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a .jsonl file")
  parser.add_argument("--only", action="append", help="rows whose name has this in it")
  args = parser.parse_args(argv[1:])
  size = args.size or ("small" if jax.default_backend() == "cpu" else "full")
  machine = provenance.machine()
  revision = provenance.revision("trellis_jax", "pallas_kernels", "benchmarks", "experiments")
  origin = {"machine": machine, "revision": revision}
  command = " ".join(["python -m benchmarks.train_step", *argv[1:]])
  found, text = [], "no row has such a name"
  for row in ROWS:
    if args.only and not any(word in row.name for word in args.only):
      continue
    found.append({**line(row, *SIZES[size]), **origin})
    jax.clear_caches()
    # After every row: whoever is stopped keeps what is there.
    text = report(found, command, f"{machine}; revision {revision}")
    provenance.write(args.results, "".join(json.dumps(x) + "\n" for x in found))
    provenance.write(args.results.with_suffix(".md"), text)
  print(text)


if __name__ == "__main__":
  main(sys.argv)

"""What every mixer costs on this machine, and from which length on it is faster than attention.

    python -m benchmarks.mixers

The mixers of the folder as their defaults have them, in fp32, one layer each. Times are medians of
interleaved rounds. The token loop is the mixer's own decoding, one token a step under one scan, and
what JAX makes of its gradient; beside it stands how much faster than the loop a forward would be
that did all its FLOPs at this machine's rate for a large matrix product. Temporary memory is what
the compiler plans. Writes results/mixers.md and mixers.jsonl.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tabulate
from flax import nnx

from benchmarks import timing
from experiments import provenance
from trellis_jax import mixers

RESULTS = pathlib.Path(__file__).parent / "results" / "mixers.jsonl"
WIDTH, HEADS, BATCH, T = 256, 4, 2, 2048
LOOP = 256  # tokens of a token loop
LENGTHS = (512, 1024, 2048, 4096, 8192)
SLOW = 8.0  # seconds from which on a call is timed once
SQUARE = 2048  # rows and columns of the matrix product
COLUMNS = (
  "mixer",
  "forward tok/s",
  "forward + backward tok/s",
  "x loop, forward",
  "x loop, both",
  "x loop, at matmul rate",
  "temp MB",
  "state bytes",
  "FLOPs a token",
  "faster than attention from",
)


class Layer:
  """One mixer with its parameters and the calls that are timed; all take (parameters, x)."""

  def __init__(self, name: str):
    self.name = name
    module = mixers.get(name)
    self.mixer = module.Mixer(WIDTH, HEADS, module.Config(), rngs=nnx.Rngs(0))
    self.graph, self.params = nnx.split(self.mixer)

  def forward(self, params, x):
    """The outputs."""
    return nnx.merge(self.graph, params)(x)[0]

  def both(self, params, x):
    """The gradients of parameters and inputs."""
    return _gradients(self.forward, params, x)

  def loop(self, params, x):
    """The outputs, one token at a time from the state of the one before."""
    mixer = nnx.merge(self.graph, params)

    def step(state, token):
      y, state = mixer(token[:, None], state)
      return state, y[:, 0]

    return jax.lax.scan(step, mixer.init_state(x.shape[0]), jnp.swapaxes(x, 0, 1))[1]

  def loop_both(self, params, x):
    """The gradients through the token loop."""
    return _gradients(self.loop, params, x)

  def compile(self, call: Callable, batch: int, length: int) -> tuple[Callable, int]:
    """Returns (the compiled call without arguments, bytes of its temporary memory)."""
    print(f"compiling {self.name}, {call.__name__}, T = {length:,}", file=sys.stderr, flush=True)
    x = 0.5 * jax.random.normal(jax.random.key(0), (batch, length, WIDTH))
    done = jax.jit(call).lower(self.params, x).compile()
    return lambda: done(self.params, x), done.memory_analysis().temp_size_in_bytes


def _gradients(call, params, x):
  return jax.grad(lambda p, x: jnp.sum(call(p, x) ** 2), argnums=(0, 1))(params, x)


def costs(layers: dict[str, Layer], length: int, loop: int, rounds: int) -> dict[str, dict]:
  """Returns the fields of each mixer's line that belong to one length."""
  sides, lines = {}, {name: {} for name in layers}
  for name, layer in layers.items():
    sides[name, "forward"], _ = layer.compile(layer.forward, BATCH, length)
    sides[name, "both"], temp = layer.compile(layer.both, BATCH, length)
    sides[name, "loop"], _ = layer.compile(layer.loop, BATCH, loop)
    sides[name, "loop_both"], _ = layer.compile(layer.loop_both, BATCH, loop)
    state = jax.tree.leaves(jax.eval_shape(lambda layer=layer: layer.mixer.init_state(1)))
    lines[name] |= {
      "temp_bytes": temp,
      "state_bytes": sum(x.size * x.dtype.itemsize for x in state),
      "flops_per_token": layer.mixer.flops(length) / length,
    }
  square = jax.random.normal(jax.random.key(0), (SQUARE, SQUARE))
  product = jax.jit(jnp.dot).lower(square, square).compile()
  sides["", "product"] = lambda: product(square, square)
  times = timing.turns(sides, rounds, SLOW)
  rate = 2 * SQUARE**3 / times.pop(("", "product"))
  for (name, side), seconds in times.items():
    lines[name]["matmul_flops_per_second"] = rate
    tokens = BATCH * (loop if side.startswith("loop") else length)
    lines[name][f"{side}_tokens_per_second"] = tokens / seconds
  return lines


def growth(
  layers: dict[str, Layer], lengths: list[int], rounds: int
) -> dict[str, dict[int, float]]:
  """Returns the seconds of a row's forward and backward by mixer and length."""
  seconds = {name: {} for name in layers}
  for length in lengths:
    sides = {name: layer.compile(layer.both, 1, length)[0] for name, layer in layers.items()}
    for name, value in timing.turns(sides, rounds, SLOW).items():
      seconds[name][length] = value
  return seconds


def crossover(own: dict[int, float], attention: dict[int, float]) -> int | None:
  """Returns the first length from which on a mixer takes less time, or None."""
  found = None
  for length in sorted(own, reverse=True):
    if own[length] >= attention[length]:
      break
    found = length
  return found


def report(lines: list[dict[str, Any]], command: str) -> str:
  """The text of mixers.md."""
  rows = [_row(line) for line in lines]
  lengths = [int(n) for n in lines[0]["seconds_by_length"]]
  times = [
    [line["mixer"], *(f"{1e3 * s:,.0f}" for s in line["seconds_by_length"].values())]
    for line in lines
  ]
  numbers = lambda rows, columns: tabulate.tabulate(
    rows, columns, "github", disable_numparse=True, colalign=("left", *["right"] * len(columns[1:]))
  )
  first = lines[0]
  rate = f"{first['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s"
  return f"""    {command}

{first["machine"]}; revision {first["revision"]}.
One layer of each mixer with its defaults, fp32, width {WIDTH}, {HEADS} heads. Batch {BATCH},
T = {first["T"]:,}: tokens per second, the compiler's temporary memory of forward and backward, a
forward's FLOPs. State: what a row carries from token to token.
"x loop": tokens per second over those of the same mixer run token by token, as it decodes, forward,
and forward and backward. "At matmul rate": what "x loop, forward" would be if all its FLOPs ran at
the {rate} of a {SQUARE:,} x {SQUARE:,} product.

{numbers(rows, COLUMNS)}

Forward and backward of one row in ms, by length. "Faster than attention from" above is the first
of these lengths from which on the mixer takes less time than attention.

{numbers(times, ("mixer", *(f"{n:,}" for n in lengths)))}
"""


def _row(line: dict[str, Any]) -> list[str]:
  lengths = [int(n) for n in line["seconds_by_length"]]
  faster = f"{line['crossover']:,}" if line["crossover"] else f"above {max(lengths):,}"
  return [
    line["mixer"],
    f"{line['forward_tokens_per_second']:,.0f}",
    f"{line['both_tokens_per_second']:,.0f}",
    f"{line['forward_tokens_per_second'] / line['loop_tokens_per_second']:.1f}",
    f"{line['both_tokens_per_second'] / line['loop_both_tokens_per_second']:.1f}",
    f"{_bound(line):.1f}",
    f"{line['temp_bytes'] / 1e6:,.0f}",
    f"{line['state_bytes']:,}",
    f"{line['flops_per_token']:,.0f}",
    "-" if line["mixer"] == "attention" else faster,
  ]


def _bound(line: dict[str, Any]) -> float:
  fastest = line["matmul_flops_per_second"] / line["flops_per_token"]
  return fastest / line["loop_tokens_per_second"]


def main(argv: list[str]) -> None:
  """Measures, prints and writes the tables."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument("--mixers", default=",".join(mixers.names()), help="names; all by default")
  parser.add_argument("--length", type=int, default=T, help="T of the first table")
  parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="T of the second")
  parser.add_argument("--loop", type=int, default=LOOP, help="tokens of a token loop")
  parser.add_argument(
    "--rounds", type=int, default=5, help="of the first table; half of the second"
  )
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a .jsonl file")
  args = parser.parse_args(argv[1:])
  # Attention is what the others are compared to.
  names = list(dict.fromkeys(["attention", *args.mixers.split(",")]))
  lengths = [int(n) for n in args.lengths.split(",")]
  layers = {name: Layer(name) for name in names}
  origin = {
    "machine": provenance.machine(),
    "revision": provenance.revision("trellis_jax", "pallas_kernels", "benchmarks"),
    "T": args.length,
  }
  measured = costs(layers, args.length, args.loop, args.rounds)
  seconds = growth(layers, lengths, max(1, args.rounds // 2))
  lines = []
  for name in names:
    at = crossover(seconds[name], seconds["attention"])
    lines.append(
      {
        "mixer": name,
        **measured[name],
        "seconds_by_length": seconds[name],
        "crossover": at,
        **origin,
      }
    )
  text = report(lines, " ".join(["python -m benchmarks.mixers", *argv[1:]]))
  provenance.write(args.results, "".join(json.dumps(line) + "\n" for line in lines))
  provenance.write(args.results.with_suffix(".md"), text)
  print(text)


if __name__ == "__main__":
  main(sys.argv)

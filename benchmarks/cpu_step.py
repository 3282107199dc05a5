"""What the gradients of a table's row at mini cost on a CPU, and what two choices are worth there.

    python -m benchmarks.cpu_step

The choices: the weights' gradients as x^T g (trellis_jax/products.py) or as JAX has them, and the
layers one after the other or as a scan. Writes results/cpu_step.md.
"""

import functools
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tabulate
from flax import nnx

from benchmarks import timing
from experiments import allocator, config, provenance, step
from experiments.configs.paper import table4
from trellis_jax import LM, products

RESULTS = pathlib.Path(__file__).parent / "results" / "cpu_step.md"
MODELS, CONTEXT, ROUNDS = ("trellis_wide", "gated_delta_net", "mamba2"), 2048, 5
# Name -> (the product of a linear map, whether the layers are a scan).
SIDES = {
  "JAX's gradients, scan": (jax.lax.dot_general, True),
  "x^T g, scan": (products.dot_general, True),
  "x^T g, one by one": (products.dot_general, False),
}


def side(model: str, product, scan: bool):
  """A call that takes the gradients of a step of a row's model, compiled."""
  cfg = table4.get_config(f"mini,{model},{CONTEXT}")
  cfg.model.scan_layers = scan
  lm_config = config.lm_config(cfg.model, cfg.data.vocab_size)
  with mock.patch.object(products, "dot_general", product):
    graph, params = nnx.split(LM(lm_config, rngs=nnx.Rngs(0)), nnx.Param)
  sums_fn = step.loss_fn(graph, z_loss=cfg.optim.z_loss, batch_shards=1)
  rng = np.random.default_rng(0)
  row = jnp.asarray(rng.integers(0, cfg.data.vocab_size, (cfg.batch_size, CONTEXT + 1)), jnp.int32)
  batch = {"tokens": row[:, :-1], "targets": row[:, 1:], "weights": jnp.ones(row[:, 1:].shape)}
  gradients = functools.partial(step.gradients, sums_fn, grad_accum=1)
  compiled = jax.jit(gradients).lower(nnx.to_pure_dict(params), batch).compile()
  return functools.partial(compiled, nnx.to_pure_dict(params), batch)


def main() -> None:
  """Prints and writes the table."""
  allocator.keep_freed_memory()
  rows = []
  for model in MODELS:
    seconds = timing.turns({name: side(model, *how) for name, how in SIDES.items()}, ROUNDS)
    first = next(iter(seconds.values()))
    rows += [[model, name, 1e3 * s, first / s] for name, s in seconds.items()]
  columns = ["model", "gradients and layers", "ms", "of the first's speed"]
  table = tabulate.tabulate(rows, columns, tablefmt="github", floatfmt=".2f")
  cfg = table4.get_config(f"mini,{MODELS[0]},{CONTEXT}")
  text = f"    python -m benchmarks.cpu_step\n\n{provenance.machine()}; Table 4's rows at mini, "
  text += f"{cfg.batch_size} x {CONTEXT} tokens, fp32, medians of {ROUNDS} rounds.\n\n{table}\n"
  provenance.write(RESULTS, text)
  print(text)


if __name__ == "__main__":
  main()

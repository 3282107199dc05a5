"""What decoding costs as the context grows: time of a step and size of the state.

    python -m benchmarks.decode_cost

The state is carried through each context by the model itself, in pieces. Writes
results/decode_cost.md.
"""

import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import tabulate
from flax import nnx

from experiments import provenance
from trellis_jax import LM, LMConfig, mixers

RESULTS = pathlib.Path(__file__).parent / "results" / "decode_cost.md"
CONTEXTS = (1024, 4096, 16384, 65536)
PIECE, STEPS, ROUNDS = 1024, 50, 5


def main() -> None:
  """Prints and writes the table."""
  cfg = LMConfig(vocab_size=4096, width=256, num_layers=5, num_heads=2)
  graph, params = nnx.split(LM(cfg, rngs=nnx.Rngs(0)))
  read = jax.jit(lambda params, tokens, state: nnx.merge(graph, params).hidden(tokens, state)[1])
  step = jax.jit(lambda params, token, state: nnx.merge(graph, params)(token, state))
  state = nnx.merge(graph, params).init_state(1)
  rng = np.random.default_rng(0)
  states, seen = {}, 0
  for context in CONTEXTS:
    while seen < context:
      tokens = jnp.asarray(rng.integers(0, cfg.vocab_size, (1, PIECE)), jnp.int32)
      state = read(params, tokens, state)
      seen += PIECE
    states[context] = jax.block_until_ready(state)
  token = jnp.ones((1, 1), jnp.int32)
  jax.block_until_ready(step(params, token, state))
  seconds = {context: [] for context in CONTEXTS}
  for _ in range(ROUNDS):  # the contexts take turns, so that only their ratio counts
    for context, state in states.items():
      start = time.perf_counter()
      for _ in range(STEPS):
        logits, state = step(params, token, state)
      jax.block_until_ready(logits)
      seconds[context].append((time.perf_counter() - start) / STEPS)
  first = np.median(seconds[CONTEXTS[0]])
  rows = []
  for context, state in states.items():
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    median = np.median(seconds[context])
    rows.append([f"{context:,}", 1e3 * median, median / first, f"{size:,}"])
  columns = ["context", "ms a token", "of the first", "state bytes"]
  table = tabulate.tabulate(rows, columns, tablefmt="github", floatfmt=".2f")
  machine, mixer = provenance.machine(), mixers.configure(cfg.mixer)
  text = f"    python -m benchmarks.decode_cost\n\n{machine}; fp32, {cfg.num_layers} layers, width "
  text += f"{cfg.width}, {cfg.num_heads} heads, M = {mixer.num_slots}, C = {mixer.chunk_size}.\n\n"
  text += f"{table}\n"
  provenance.write(RESULTS, text)
  print(text)


if __name__ == "__main__":
  main()

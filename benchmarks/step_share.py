"""The op's share of a training step of the 125M model on TPUs, expected rather than measured.

    python -m benchmarks.step_share

The op's time is that of results/kernel_tpu.jsonl, libtpu's static estimates; the rest of the step
is a roofline of its matrix products and of the bytes that its other passes move. Writes
results/step_share.md.
"""

import tabulate

from benchmarks import kernel_tpu
from benchmarks.tpu_estimate import Case
from experiments import provenance
from experiments.configs.paper import base
from trellis_jax import mixers

RESULTS = kernel_tpu.RESULTS.with_name("step_share.md")
# The 125M model of the paper, tied embeddings.
SIZE = base.SIZES["125m"]
WIDTH, LAYERS, HEADS, VOCAB = SIZE.width, SIZE.num_layers, SIZE.num_heads, SIZE.vocab_size
HEAD, MLP = WIDTH // HEADS, SIZE.mlp_widths[list(base.NAMES).index("trellis")]
DEFAULT = mixers.get("trellis").Config()
SLOTS = DEFAULT.num_slots
# One chip's part of a step: 16 rows of 2,048, half a million tokens on 16 chips.
TOKENS = 16 * 2048
PEAK = {"v5e": 197, "v5p": 459}  # TFLOP/s of bfloat16, as published
UTILISATION = 0.82  # of the peak: libtpu's estimate of a product of 2,048 x 2,048 matrices
MOST = 0.25
# (estimated case, heads computed per head of the model): 12 heads of one row of the batch, and as
# many heads as fill a program, which is what a call of several rows does with its rows; 12 heads of
# C = 16 fill 8 of a pack and then half of the next one.
CASES = (
  (Case(), 1),
  (Case(H=HEADS), 1),
  (Case(C=16, H=64, T=512), 16 / 12),
  (Case(C=16, H=HEADS, T=512), 1),
  (Case("v5p", B=2), 1),
  (Case("v5p", H=HEADS, B=2), 1),
  (Case("v5p", C=16, H=64, B=2, T=512), 16 / 12),
  (Case("v5p", C=16, H=HEADS, B=2, T=512), 1),
  (Case(curvature=1.0), 1),
  (Case(H=HEADS, curvature=1.0), 1),
  (Case("v5p", B=2, curvature=1.0), 1),
  (Case("v5p", H=HEADS, B=2, curvature=1.0), 1),
)


def weights() -> dict[str, int]:
  """Weights that every token is multiplied with, over all layers."""
  maps = WIDTH * (WIDTH + HEADS * (HEAD + SLOTS + 2))  # q and k share theirs; v, alpha, gates
  return {
    "mixer": LAYERS * (maps + 2 * WIDTH * WIDTH),  # with output gate and output
    "mlp": LAYERS * 3 * WIDTH * MLP,
    "head": WIDTH * VOCAB,
  }


def product_seconds(chip: str) -> float:
  """Of a token's products in the forward and, twice as many, the backward, at the chip's peak."""
  return 3 * 2 * sum(weights().values()) / (PEAK[chip] * 1e12)


def moved_bytes() -> float:
  """Bytes a token moves in passes that are neither products nor the op.

  Arrays of bfloat16 in the forward, each read or written once and, in the backward, twice: two
  norms (2 widths each), four convolutions with the activation and norm that follow (2 each), the
  read's norm and gate (3), SwiGLU's product (3 hidden widths). Of the loss: fp32 logits written and
  read, their gradient written. Of AdamW: parameter and two moments read and written and a gradient
  read, in fp32, shared by the chip's tokens.
  """
  layer = 3 * 2 * ((4 + 4 + 4 + 3) * WIDTH + 3 * MLP)
  return LAYERS * layer + (4 + 4 + 2) * VOCAB + 28 * sum(weights().values()) / TOKENS


def op_seconds(case: Case, padding: float, rows: dict[Case, dict]) -> float:
  """Of a token in all layers and heads, forward and backward, from the committed estimates."""
  cycles = sum(rows[case._replace(what=what)]["cycles"] for what in ("saving", "backward"))
  ghz = kernel_tpu.CHIPS[case.chip][0]
  return cycles / (ghz * 1e9) / case.head_tokens * padding * HEADS * LAYERS


def _chunks(case: Case) -> str:
  return f"{case.C}, linearised" if case.curvature else str(case.C)


def report(rows: dict[Case, dict]) -> str:
  """The text of step_share.md."""
  body, shares = [], []
  for case, padding in CASES:
    op, products = op_seconds(case, padding, rows), product_seconds(case.chip)
    slower, moved = products / UTILISATION, moved_bytes() / (kernel_tpu.CHIPS[case.chip][1] * 1e9)
    share = op / (op + slower + moved)
    shares.append((case, share))
    line = [case.chip, _chunks(case), f"{case.H} heads" + f" x {padding:.2f}" * (padding > 1)]
    line += [f"{1e6 * seconds:.2f}" for seconds in (op, products, slower, moved)]
    body.append([*line, f"{share:.0%}", f"{op / (op + products):.0%}"])
  columns = [
    "chip",
    "C",
    "estimate of",
    "op, us / token",
    "products at peak",
    f"at {UTILISATION:.0%}",
  ]
  columns += ["other passes", "share of the op", "beside products at peak alone"]
  table = tabulate.tabulate(body, columns, "github", disable_numparse=True)
  default = DEFAULT.chunk_size, DEFAULT.curvature
  of_default = [share for case, share in shares if (case.C, case.curvature) == default]
  over = [f"{c.chip} at C = {_chunks(c)} ({share:.0%})" for c, share in shares if share > MOST]
  least, most = min(of_default), max(of_default)
  verdict = f"Linearised chunks of {DEFAULT.chunk_size} are the default: {least:.0%} to {most:.0%}."
  verdict += f" Over {MOST:.0%}: {', '.join(over)}." if over else f" No row is over {MOST:.0%}."
  versions = ", ".join(sorted({row["libtpu"] for row in rows.values()}))
  rates = lambda of: " and ".join(f"{of(chip)} ({chip})" for chip in PEAK)
  peaks, bandwidths = rates(PEAK.get), rates(lambda chip: kernel_tpu.CHIPS[chip][1])
  total = sum(weights().values())
  return f"""    python -m benchmarks.step_share

Expected, not measured: nothing here has run on a TPU. The 125M model: {LAYERS} x {WIDTH},
{HEADS} heads of {HEAD}, M = {SLOTS}, SwiGLU {MLP}, vocabulary {VOCAB}, bfloat16, {total / 1e6:.0f}M
weights in products, {TOKENS} tokens a chip and step, no rematerialisation, no communication.

{table}

**{verdict}**

* Op: rows of kernel_tpu.md (libtpu {versions}), forward that saves and backward, times
  {HEADS} heads and {LAYERS} layers. They have LN-SiLU on the read, the default nothing.
  `12 heads` is one row of the batch a program. A training step's call has several, and a program
  takes as many of them as fill it; the estimator cannot see that, so the other rows stand for it:
  as many heads of one row, and what 12 heads waste of the last pack (at C = 16 a pack has 8 heads).
* Products: 6 FLOPs a weight and token at {peaks} TFLOP/s. {UTILISATION:.0%} is what libtpu
  expects of a product of 2,048 x 2,048 matrices in Pallas; a step reaches less as a rule, which
  would lower the op's share.
* Other passes: {moved_bytes() / 1e3:.0f} kB a token at {bandwidths} GB/s: norms, convolutions,
  gates, SwiGLU's product, loss and AdamW, each array once, with nothing fused away or hidden. The
  last column leaves them out.
"""


def main() -> None:
  """Prints the table and writes it."""
  text = report(kernel_tpu.committed())
  provenance.write(RESULTS, text)
  print(text)


if __name__ == "__main__":
  main()

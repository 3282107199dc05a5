"""What all rows of the paper's tables share: sizes, recipe, models, and how a row is chosen.

A table is a file beside this one. Its `rows(scale)` are the table's rows at one of four scales:

    paper   the paper's sizes, tokens and context lengths
    small   32 million parameters, 200 million tokens: planned for less than 25 minutes of one GPU
    midi    21 million parameters, 4 million tokens: less than two hours of one core a run
    mini    0.6 million parameters, 1 million tokens: 2 to 3 minutes of one core, scoring included

`python -m experiments.tables.run` trains and scores them one after the other. A single one is

    python -m experiments.main --config=experiments/configs/paper/table2.py:paper,no_forget

where the scale and then values of the row's labels, in their order, follow after the colon.

App. A of the paper gives sizes, peak learning rates and tokens. The rest of the recipe is not
stated; it is that of TTT's authors (Sun et al., 2024), which agrees with the 125M row: AdamW with
betas .9, .95, weight decay .1, clipping at 1, 10% of linear warm-up, then a cosine to 1e-5, half a
million tokens a step, MLPs of 2048, 2736, 4096 and 5504, a vocabulary of 32,000, tied embeddings,
initial values N(0, .02). At the small scales initial values are the library's, and the vocabulary
is a BPE trained on the text. Rivals have Trellis's parameters to 1%, by the width of their MLPs.
Rows at the paper's scale read data/NAME, and tokens of data/tokenizer.json.

The paper names no chunk length. All rows have the library's, linearised chunks of 64 tokens, unless
their label says otherwise; Table 2 has the paper's stale ones as rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_collections

from experiments.configs import default

SCALES = ("paper", "small", "midi", "mini")
# Per step, at any length.
BATCH_TOKENS = {"paper": 1 << 19, "small": 1 << 16, "midi": 1 << 13, "mini": 1 << 13}
CPU = ("midi", "mini")  # what a core trains: in fp32, their few layers one after the other
# Mixers by the names of the paper's tables.
NAMES = {
  "attention": "Transformer++",
  "linear_attention": "Linear attention",
  "delta_net": "DeltaNet",
  "mamba2": "Mamba2",
  "gated_delta_net": "Gated DeltaNet",
  "ttt_linear": "TTT",
  "gsa": "GSA",
  "trellis": "Trellis",
}


@dataclasses.dataclass(frozen=True)
class Size:
  """A model's size and recipe; `mlp_widths` are those of the mixers of `NAMES`, in their order."""

  width: int
  num_layers: int
  num_heads: int
  mlp_widths: tuple[int, ...]
  vocab_size: int
  peak_lr: float
  tokens: float  # trained on
  scale: str = "paper"

  @property
  def rates(self) -> tuple[float, ...]:
    """The three learning rates that every row is tried with."""
    return tuple(float(f"{self.peak_lr * factor:.3g}") for factor in (0.4, 1, 2.5))


SIZES = {
  "125m": Size(
    768, 12, 12, (2312, 2312, 2304, 1712, 1792, 2288, 2056, 2048), 32_000, 3e-3, 2.4e9
  ),  # 117 million parameters
  "170m": Size(
    768, 12, 16, (2400, 2400, 2392, 1800, 1880, 2376, 2064, 2048), 32_000, 3e-3, 15e9
  ),  # 119 million
  "350m": Size(
    1024, 24, 16, (3088, 3088, 3080, 2312, 2392, 3064, 2752, 2736), 32_000, 1.5e-3, 15e9
  ),  # 362 million; Table 4 says 7.5 billion tokens
  "780m": Size(
    1536, 24, 16, (4448, 4448, 4440, 3336, 3416, 4408, 4112, 4096), 32_000, 1.25e-3, 30e9
  ),  # 768 million
  "1.3b": Size(
    2048, 24, 32, (6208, 6208, 6200, 4744, 4824, 6176, 5528, 5504), 32_000, 1e-3, 26e9
  ),  # not in App. A: TTT's
  "small": Size(
    512, 8, 8, (1584, 1584, 1584, 1152, 1240, 1560, 1416, 1408), 8192, 2e-3, 2e8, "small"
  ),  # 32 million
  "midi": Size(
    512, 6, 8, (1584, 1584, 1584, 1152, 1240, 1560, 1416, 1408), 1024, 3e-3, 2**22, "midi"
  ),  # 21 million
  "mini": Size(
    128, 2, 2, (432, 432, 424, 256, 344, 408, 392, 384), 1024, 1.25e-2, 2**20, "mini"
  ),  # 0.6 million
}


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table at a scale: what tells it apart, its run, and the paper's number.

  At the small scales that is the number of the paper's row that this one stands for.
  """

  labels: dict[str, Any]
  make: Callable[[], ml_collections.ConfigDict]
  tokens: int  # trained on
  rates: tuple[float, ...]
  published: Any = None

  @functools.cached_property
  def config(self) -> ml_collections.ConfigDict:
    """The run, made when it is asked for."""
    return self.make()


def row(
  labels: dict[str, Any],
  size: str,
  mixer: str,
  context: int,
  *,
  tokens: float = 0,
  data: str = "",
  published: Any = None,
  mlp_width: int = 0,
  **knobs: Any,
) -> Row:
  """A row of a size, mixer and length.

  Args:
    labels: what tells it apart from the table's other rows.
    size: a name of SIZES.
    mixer: a name of NAMES.
    context: T, tokens that a row of the batch has.
    tokens: trained on; 0 is the size's.
    data: the corpus of a row at the paper's scale.
    published: the paper's number.
    mlp_width: of the MLP; 0 is the size's for the mixer.
    **knobs: of the mixer, where they are not its defaults.
  """
  s = SIZES[size]
  steps = round((tokens or s.tokens) / BATCH_TOKENS[s.scale])
  mlp_width = mlp_width or s.mlp_widths[list(NAMES).index(mixer)]
  make = lambda: _config(labels, s, mixer, mlp_width, context, steps, data, knobs)
  return Row(labels, make, steps * BATCH_TOKENS[s.scale], s.rates, published)


def _config(
  labels, s: Size, mixer: str, mlp_width: int, context: int, steps: int, data: str, knobs
):
  cfg = default.get_config()
  cfg.workdir = "/".join(["runs", s.scale, "-".join(map(str, labels.values()))])
  cfg.seq_len, cfg.batch_size = context, BATCH_TOKENS[s.scale] // context
  cfg.steps = steps
  cfg.data.packing = "concat"
  cfg.data.vocab_size = s.vocab_size
  if s.scale == "paper":
    cfg.data.path, cfg.data.tokenizer = f"data/{data}", "data/tokenizer.json"
    cfg.model.init_std = 0.02
  cfg.model.update(width=s.width, num_layers=s.num_layers, num_heads=s.num_heads, mixer=mixer)
  cfg.model.mlp_width = mlp_width
  if s.scale in CPU:
    cfg.model.dtype, cfg.model.scan_layers = "float32", False
  else:  # or a step keeps the activations of all layers, of 65,536 tokens at small
    cfg.model.dtype, cfg.model.remat = "bfloat16", "full"
  cfg.model.attention.cache_length = context
  cfg.model[mixer].update(knobs)
  cfg.optim.peak_lr, cfg.optim.end_lr_ratio = s.peak_lr, 1e-5 / s.peak_lr
  cfg.optim.warmup_steps = cfg.steps // 10
  cfg.checkpoint.every, cfg.checkpoint.keep = max(1, cfg.steps // 8), 1
  cfg.eval.every, cfg.eval.batches = max(1, cfg.steps // 4), 4
  cfg.log.every = max(1, cfg.steps // 20)
  return cfg


def contexts(scale: str, lengths: Iterable[int]) -> Iterator[int]:
  """The lengths of which a step has room for one."""
  return (length for length in lengths if length <= BATCH_TOKENS[scale])


def check(scale: str) -> None:
  """Raises ValueError for a scale that is not there."""
  if scale not in SCALES:
    raise ValueError(f"scale {scale!r} is unknown; accepted are {', '.join(SCALES)}")


def pick(rows: Callable[[str], Iterable[Row]], words: str) -> ml_collections.ConfigDict:
  """The run of "SCALE,VALUE,...", ValueError unless the values tell one row apart."""
  scale, *values = words.split(",")
  check(scale)
  of = {",".join(map(str, row.labels.values())): row for row in rows(scale)}
  found = [name for name in of if name.split(",")[: len(values)] == values]
  if len(found) != 1:
    raise ValueError(
      f"row {words!r} fits {len(found)} rows; accepted are {scale} and one of {' '.join(of)}"
    )
  return of[found[0]].config

"""Table 3: RULER's S-NIAH 1 to 3 of five models of "1B", percent of the needles that are found.

    python -m experiments.tables.run table3 --scale=mini --tasks=FOLDER --rates=1
    python -m experiments.main --config=experiments/configs/paper/table3.py:paper,trellis

The paper has Trellis at 99.2 to 97.8 on S-NIAH-1 from 2k to 8k, at 99.4 to 34.6 on S-NIAH-2, at
86.4 to 28.4 on S-NIAH-3 from 1k to 4k. --tasks names the text that needles hide in (see
experiments/evals/niah.py). A run takes 2.2e20 FLOPs. Size, corpus and the length that the models
were trained at are not stated; here they are TTT's 1.3B, C4 and 4k.

The models of the small scales would find little after such text. They are trained on samples of up
to 4k tokens instead, drawn by other seeds than those that are looked for and from anywhere in the
haystack, and learn the answers alone (experiments/tasks/niah.py): so the perplexities there are
those of held-out answers, and 8k is twice what the models know. `trellis_wide` is that of Table 4,
of Gated DeltaNet's memory.
"""

import dataclasses
import functools

import ml_collections

from experiments.configs.paper import base, table4

CONTEXT = 4096
CELLS = tuple(
  (kind, length)
  for kind, lengths in (
    ("niah_single_1", (2048, 4096, 8192)),
    ("niah_single_2", (2048, 4096, 8192)),
    ("niah_single_3", (1024, 2048, 4096)),
  )
  for length in lengths
)
PUBLISHED = {
  "ttt_linear": (98.4, 98.8, 98.0, 60.2, 36.6, 10.2, 85.8, 78.8, 28.0),
  "mamba2": (98.6, 61.4, 31.0, 98.4, 55.8, 14.2, 62.2, 42.2, 4.2),
  "delta_net": (96.8, 98.8, 98.6, 47.2, 15.4, 12.8, 85.2, 46.2, 20.0),
  "gated_delta_net": (89.8, 91.4, 90.0, 99.2, 91.8, 26.4, 86.4, 82.6, 24.4),
  "trellis": (99.2, 95.2, 97.8, 99.4, 94.2, 34.6, 86.4, 82.8, 28.4),
}

# At the small scales. Numbers come first, and a uuid, of five times their tokens, is rarer.
KINDS = ("niah_single_1", "niah_single_2", "niah_single_1", "niah_single_3", "niah_single_2")
TASK = {"kinds": ",".join(KINDS), "min_length": 32, "answer_only": True, "train_examples": 1 << 20}
TOKENS = {"small": 2e8, "midi": 2**23, "mini": 2**23}
GROW = 2 / 3  # of the tokens, over which the longest samples grow


def rows(scale: str):
  """Yields the table's rows at a scale."""
  if scale == "paper":
    for model, numbers in PUBLISHED.items():
      yield base.row(dict(model=model), "1.3b", model, CONTEXT, data="c4", published=numbers)
    return
  for model in (*PUBLISHED, "trellis_wide"):
    mixer, knobs = ("trellis", table4.WIDE) if model == "trellis_wide" else (model, {})
    mlp = table4.matched_mlp(scale, knobs) if knobs else 0
    shared = dict(tokens=TOKENS[scale], published=PUBLISHED.get(model), mlp_width=mlp)
    row = base.row(dict(model=model), scale, mixer, CONTEXT, **shared, **knobs)
    yield dataclasses.replace(row, make=functools.partial(_on_samples, row))


def _on_samples(row: base.Row) -> ml_collections.ConfigDict:
  """The run of samples in the place of text."""
  cfg = row.make()
  cfg.data.task = "niah"
  cfg.data.niah.update(TASK, grow_examples=round(GROW * row.tokens / CONTEXT))
  cfg.data.niah.tokenizer = f"bpe-{cfg.data.vocab_size}"
  return cfg


def get_config(row: str = "mini,trellis") -> ml_collections.ConfigDict:
  """The run of a row, "SCALE,LABEL"; ValueError for one that is not there."""
  return base.pick(rows, row)

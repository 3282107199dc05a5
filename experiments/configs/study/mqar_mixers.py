"""Recall of every mixer in one shell: pairs x size of the state, three seeds.

    python -m experiments.study mqar_mixers

MQAR in an easy setting: 2 layers of width 32, one head, T = 32, vocabulary 32, the pairs after 4
blank tokens, 800 steps of 32 examples. The size is the width of keys and values, and the number of
slots where there are any; what a mixer's state comes to is in the table of state sizes.
"""

from experiments.configs import mqar
from trellis_jax import mixers

SEEDS = (0, 1, 2)
LEARNING_RATES = (3e-3, 1e-2)
COLUMNS = ("pairs", "size")
PAIRS, SIZES = (2, 4), (8, 16)


def knobs(mixer: str, size: int) -> dict:
  """The knobs of a mixer that make its memories `size` wide."""
  fields = mixers.get(mixer).Config.__dataclass_fields__
  wide = {"head_dim": size, "value_dim": size, "num_slots": size, "state_dim": size}
  return {name: value for name, value in wide.items() if name in fields}


def config(mixer: str, pairs: int, size: int):
  """The run of one setting."""
  cfg = mqar.get_config()
  cfg.steps, cfg.batch_size, cfg.seq_len = 800, 32, 32
  cfg.data.mqar.update(vocab_size=32, pairs=pairs, blanks=4)
  cfg.model.update(mixer=mixer, width=32, num_layers=2, num_heads=1, mlp_width=64)
  cfg.model[mixer].update(knobs(mixer, size))
  cfg.optim.warmup_steps = 80
  cfg.log.every, cfg.eval.every, cfg.eval.batches = 10, 200, 16
  return cfg


def cells():
  """Yields (labels, config) of every setting."""
  for mixer in mixers.names():
    for pairs in PAIRS:
      for size in SIZES:
        yield dict(mixer=mixer, pairs=pairs, size=size), config(mixer, pairs, size)

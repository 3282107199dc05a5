"""Recall of every mixer in one shell: pairs x size of the state, three seeds.

    python -m experiments.study mqar_mixers

MQAR in an easy setting: 2 layers of width 32, one head, T = 32, vocabulary 32, the pairs after 4
blank tokens, 1,000 steps of 32 examples. All have a peak learning rate of 5e-3, so the table says
that a mixer learns, not which one is better; GLA is there at 1e-2 too. The size is the width of
keys and values, and the number of slots where there are any. All have short convolutions of 4 taps,
without which a recurrence that never forgets cannot tell which value came after which key.
"""

from experiments.configs import default, mqar
from trellis_jax import mixers

SEEDS = (0, 1, 2)
LEARNING_RATES = ()
COLUMNS = ("pairs", "size")
PAIRS, SIZES = (2, 4), (8, 16)
RATE, RATES = 5e-3, {"gla": (1e-2,)}  # of all, and more


def knobs(mixer: str, size: int) -> dict:
  """The knobs of a mixer that make its memories `size` wide."""
  fields = mixers.get(mixer).Config.__dataclass_fields__
  # As the lines were run: keys start at the present token, Trellis's values have no convolution.
  wide = {"value_dim": size, "num_slots": size, "conv_taps": 4, "conv_decay": 0.0}
  wide["state_dim" if "state_dim" in fields else "head_dim"] = size
  wide |= default.PLAIN if mixer == "trellis" else {}
  return {name: value for name, value in wide.items() if name in fields}


def config(mixer: str, pairs: int, size: int, rate: float = RATE):
  """The run of one setting."""
  cfg = mqar.get_config()
  cfg.steps, cfg.batch_size, cfg.seq_len = 1000, 32, 32
  cfg.data.mqar.update(vocab_size=32, pairs=pairs, blanks=4)
  cfg.model.update(mixer=mixer, width=32, num_layers=2, num_heads=1, mlp_width=64)
  cfg.model[mixer].update(knobs(mixer, size))
  cfg.optim.warmup_steps, cfg.optim.peak_lr = 100, rate
  cfg.log.every, cfg.eval.every, cfg.eval.batches = 10, 250, 16
  return cfg


def cells():
  """Yields (labels, config) of every setting."""
  for mixer in mixers.names():
    names = {RATE: mixer} | {rate: f"{mixer} at {rate:g}" for rate in RATES.get(mixer, ())}
    for rate, name in names.items():
      for pairs in PAIRS:
        for size in SIZES:
          labels = dict(mixer=name, pairs=pairs, size=size)
          yield labels, config(mixer, pairs, size, rate)

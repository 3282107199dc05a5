"""Recall of the default reading, at three learning rates a factor of two apart and on five seeds.

    python -m experiments.study default_reading

MQAR as in experiments/configs/mqar.py: 6 pairs after 20 blank tokens, T = 64, vocabulary 64,
M = D = 32, 2 layers, width 64, 3,000 steps of 32 examples. C = 16 takes all inner gradients of a
chunk at its start, C = 1 is the exact recurrence; the step starts at 1 / C, or .5 for C = 1.
"""

from experiments.configs import mqar

SEEDS = (0, 1, 2, 3, 4)
LEARNING_RATES = ()
COLUMNS = ("rate",)
RATES, CHUNKS = (1.5e-3, 3e-3, 6e-3), (16, 1)


def cells():
  """Yields (labels, config) of every setting."""
  for chunk in CHUNKS:
    for rate in RATES:
      cfg = mqar.get_config()
      cfg.steps, cfg.optim.warmup_steps, cfg.optim.peak_lr = 3000, 300, rate
      cfg.model.trellis.chunk_size = chunk
      yield dict(C=chunk, rate=rate), cfg

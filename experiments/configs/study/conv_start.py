"""Where the convolution of keys starts: at the present token alone, or at 2^-j, j tokens before it.

    python -m experiments.study conv_start

MQAR as in experiments/configs/mqar.py, stale chunks of 16 tokens and the read through LN-SiLU,
1,000 steps of 32 examples at a learning rate of 1.5e-3. The lines hold what the memories do, see
experiments/traces.py.
"""

from experiments.configs import mqar

SEEDS = (0, 1, 2)
LEARNING_RATES = ()
COLUMNS = ("conv_decay",)
TRACES = ("binding", "rank_target", "write_v", "higher_order")  # that its figure shows
STARTS = (0.0, 0.5)


def cells():
  """Yields (labels, config) of every setting."""
  for decay in STARTS:
    cfg = mqar.get_config()
    cfg.steps, cfg.optim.warmup_steps, cfg.optim.peak_lr = 1000, 100, 1.5e-3
    cfg.model.trellis.update(mqar.STALE, conv_decay=decay)
    cfg.eval.every, cfg.eval.batches = 50, 8
    yield dict(model="trellis C=16 stale", conv_decay=decay), cfg

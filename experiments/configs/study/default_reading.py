"""Recall of readings of the paper, at three learning rates a factor of two apart, on five seeds.

    python -m experiments.study default_reading

MQAR as in experiments/configs/mqar.py: 6 pairs after 20 blank tokens, T = 64, vocabulary 64,
M = D = 32, 2 layers, width 64, 1,000 steps of 32 examples. "trellis" is the library's default,
linearised chunks of 64, here one chunk, and also in chunks of 16. "plain" has no convolutions of
values and codes, values of length 1 and forget gates from .98, and so has "stale", which has all
inner gradients of a chunk taken at its start, a step that starts at 1 / C and not .5, and the read
through LN-SiLU; C = 1 is the exact recurrence. "linear" has linear phi and layer-normed targets.
Gated DeltaNet has the same shell, keys of 32 and values of 64; its convolutions start at the
present token by default, Trellis's of keys at 2^-j.
"""

from experiments.configs import default, mqar

SEEDS = (0, 1, 2, 3, 4)
LEARNING_RATES = ()
COLUMNS = ("rate",)
RATES = (1.5e-3, 3e-3, 6e-3)
MODELS = {
  "trellis": ("trellis", {}),
  "trellis plain": ("trellis", default.PLAIN),
  "trellis C=16": ("trellis", dict(chunk_size=16)),
  "trellis C=16 stale": ("trellis", mqar.STALE),
  "trellis C=1": ("trellis", dict(chunk_size=1)),
  "gated_delta_net": ("gated_delta_net", dict(head_dim=32, value_dim=64, conv_taps=4)),
  "gated_delta_net conv_decay=0.5": (
    "gated_delta_net",
    dict(head_dim=32, value_dim=64, conv_taps=4, conv_decay=0.5),
  ),
  "trellis linear C=1": ("trellis", mqar.READINGS["linear"]),
}


def cells():
  """Yields (labels, config) of every setting."""
  for name, (mixer, knobs) in MODELS.items():
    for rate in RATES:
      cfg = mqar.get_config()
      cfg.steps, cfg.optim.warmup_steps, cfg.optim.peak_lr = 1000, 100, rate
      cfg.eval.every = 250
      cfg.model.mixer = mixer
      cfg.model[mixer].update(knobs)
      yield dict(model=name, rate=rate), cfg

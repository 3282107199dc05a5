"""Overwriting and keeping at equal states: keys bound again, asked for after a gap.

    python -m experiments.study rebind

experiments/tasks/rebind.py with 6 keys, of which 0, 3 or 6 are bound again, and random tokens in
the gap, 16 or 80 long, and between the queries. 2 layers of width 64, one head, 1,000 steps of 32
examples. The memories of a layer are 2,048 floats: for Trellis 32 slots of keys and values 32 wide,
for the delta rules keys 32 and values 64 wide. All have short convolutions of 4 taps.
"""

from experiments.configs import mqar

SEEDS = (0, 1, 2)
LEARNING_RATES = (3e-3, 6e-3)
COLUMNS = ("rebound", "gap")
REBOUND, GAPS = (0, 3, 6), (16, 80)
RIVAL = dict(head_dim=32, value_dim=64, conv_taps=4)
MODELS = {
  "trellis": ("trellis", {}),
  "trellis C=16 stale": ("trellis", mqar.STALE),
  "trellis C=1": ("trellis", dict(chunk_size=1)),
  "gated_delta_net": ("gated_delta_net", RIVAL),
  "delta_net": ("delta_net", RIVAL),
}


def cells():
  """Yields (labels, config) of every setting."""
  for name, (mixer, knobs) in MODELS.items():
    for rebound in REBOUND:
      for gap in GAPS:
        cfg = mqar.get_config()
        cfg.steps, cfg.optim.warmup_steps = 1000, 100
        cfg.data.task = "rebind"
        cfg.data.rebind.update(pairs=6, rebound=rebound, gap=gap, noise=True)
        cfg.seq_len = 24 + 2 * rebound + gap
        cfg.model.mixer = mixer
        cfg.model[mixer].update(knobs)
        cfg.eval.every, cfg.eval.batches = 250, 16
        yield dict(model=name, rebound=rebound, gap=gap), cfg

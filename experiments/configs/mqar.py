"""Multi-query associative recall: 6 pairs after 20 blank tokens, T = 64, a vocabulary of 64.

    python -m experiments.main --config=experiments/configs/mqar.py
    python -m experiments.main --config=experiments/configs/mqar.py:linear

The argument is a reading of the paper: none is the library's default, "linear" the one with linear
phi, layer-normed targets and the exact recurrence (chunk_size 1). A run takes about five minutes on
one core. `eval/accuracy` is the share of held-out queries that are answered right; guessing among
an example's six values gives 1/6. configs/study/default_reading.py has readings over seeds and
learning rates.
"""

import ml_collections

from experiments.configs import default

# Chunks, read and writes as the paper has them, or nearly.
STALE = default.PLAIN | {"chunk_size": 16, "curvature": 0.0, "phi_out": "ln_silu"}
READINGS = {
  "": {},
  "linear": {"phi": "identity", "target": "layer_norm", "chunk_size": 1, "step_init": 0.5},
}


def get_config(reading: str = "") -> ml_collections.ConfigDict:
  """The run of a reading; ValueError for one that is not there."""
  if reading not in READINGS:
    accepted = ", ".join(filter(None, READINGS))
    raise ValueError(f"reading {reading!r} is unknown; accepted are none or {accepted}")
  cfg = default.get_config()
  cfg.workdir = f"runs/mqar-{reading}" if reading else "runs/mqar"
  cfg.steps = 2000
  cfg.batch_size = 32
  cfg.seq_len = 64
  cfg.data.task = "mqar"  # its knobs' defaults are those of this run

  cfg.model.width = 64
  cfg.model.num_layers = 2
  cfg.model.num_heads = 1
  cfg.model.mlp_width = 128
  cfg.model.tie_embeddings = False
  cfg.model.trellis.num_slots = 32
  cfg.model.trellis.head_dim = 32
  cfg.model.trellis.update(READINGS[reading])

  cfg.optim.peak_lr = 3e-3
  cfg.optim.end_lr_ratio = 0.05
  cfg.optim.schedule = "cosine"
  cfg.optim.warmup_steps = cfg.steps // 10
  cfg.optim.b1 = 0.9
  cfg.optim.b2 = 0.98
  cfg.optim.weight_decay = 0.01
  cfg.optim.clip = 1.0

  cfg.checkpoint.every = 500
  cfg.checkpoint.keep = 1
  cfg.eval.every = 500
  cfg.eval.batches = 32  # 1,024 examples, 6,144 queries
  cfg.log.every = 20
  cfg.log.tensorboard = False
  return cfg

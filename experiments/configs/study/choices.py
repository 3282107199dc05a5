"""What each choice that the paper leaves open does to recall in noise, one at a time.

    python -m experiments.study choices

MQAR as in configs/study/mqar_noise.py with 8 pairs and n = 16: 16 slots of keys and values 16 wide,
one head, 1,000 steps of 32 examples at a learning rate of 3e-3. The row without a change is the
library's default, linearised chunks of 64, which is one chunk here, and each other row changes what
it is named by; the inner step starts where that form of the chunk has it start. Shapes and heads
keep the memories' 2 n^2 floats.
"""

from experiments.configs import default
from experiments.configs.study import mqar_noise

SEEDS = (0, 1, 2)
LEARNING_RATES = ()
COLUMNS = ("n",)
PAIRS, SIZES = 8, (16,)
CHOICES = (
  {},
  # Codes, and what reads them.
  {"phi_out": "ln_silu"},
  {"f": "identity"},
  {"phi": "identity", "target": "layer_norm"},
  {"phi": "silu"},
  {"phi": "l2_silu"},
  {"phi_eps": 10.0},
  {"phi_eps": 0.1},
  {"phi_eps": 1e-5},
  {"target": "layer_norm"},
  {"target": "linear"},
  {"f": "l2_silu"},
  {"f": "softmax"},
  {"phi_out": "l2_silu"},
  # Steps, and what follows them inside a chunk. Stale steps of up to 2 / C cannot overshoot.
  {"step_init": 0.125},
  {"step_init": 0.0625},
  {"step_scale": 0.5, "step_init": 0.25},
  {"step_scale": 2.0, "step_init": 1.0},
  {"step_form": "softplus"},
  {"step_form": "constant"},
  {"curvature": 0.5},
  {"curvature": 2.0},
  {"chunk_size": 1},
  {"chunk_size": 16},
  {"curvature": 0.0},
  {"chunk_size": 16, "curvature": 0.0},
  {"chunk_size": 4, "curvature": 0.0},
  {"chunk_size": 16, "curvature": 0.0, "step_scale": 0.125},
  {"chunk_size": 16, "curvature": 0.0, "step_init": 0.25},
  # What is forgotten, and what a sequence starts from.
  {"forget": False},
  {"forget_form": "rate"},
  {"forget_init": 0.9},
  {"forget_init": 0.98},
  {"forget_init": 0.998},
  {"initial_memory": "learned"},
  {"initial_memory": "learned", "memory_std": 0.25},
  # Keys, queries, values and codes.
  {"share_qk": False},
  {"conv_activation": "none"},
  {"conv_taps": 1},
  {"conv_decay": 0.0},
  {"conv_spread": 0.5},
  {"qk_norm": "none"},
  {"v_norm": "none"},
  {"v_eps": 1e-6},
  {"v_activation": "silu"},
  {"v_conv": False},
  {"alpha_conv": False},
  default.PLAIN,
  default.PLAIN | {"v_activation": "silu"},
  default.PLAIN | {"v_conv": True},
  default.PLAIN | {"v_conv": True, "v_activation": "silu"},
  # The path through the inner gradient, and after the read.
  {"outer_gradient": 0.0},
  {"gate": "silu"},
  {"gate": "none"},
  {"post_norm": "none"},
  # Shapes of as many floats.
  {"num_slots": 32, "head_dim": 8, "value_dim": 8},
  {"num_slots": 8, "head_dim": 32, "value_dim": 32},
  {"num_heads": 2, "head_dim": 8, "value_dim": 8},
)


def cells():
  """Yields (labels, config) of every setting."""
  base = {(x["model"], x["pairs"], x["n"]): cfg for x, cfg in mqar_noise.cells()}
  for n in SIZES:
    for change in CHOICES:
      cfg = base["trellis", PAIRS, n].copy_and_resolve_references()
      knobs = dict(change)
      cfg.model.num_heads = knobs.pop("num_heads", cfg.model.num_heads)
      cfg.model.trellis.update(knobs)
      cfg.optim.peak_lr = 3e-3
      name = " ".join(f"{k}={v}" for k, v in change.items())
      yield dict(choice=name or "default", n=n), cfg

"""The gradient through the inner gradient: whole, tempered by a half, or none (first order).

    python -m experiments.study outer_gradient

MQAR as in experiments/configs/mqar.py; ten seeds, 700 steps of 32 examples at a learning rate of
3e-3. "trellis" is the library's default, linearised chunks of 64, which is one chunk here; "plain"
has no convolutions of values and codes, values of length 1 and forget gates from .98, and so has
"stale", whose chunks of 16 are not linearised and which reads through LN-SiLU. `rho` scales what
the inner gradient's own derivative by the memory sends back; the path through the targets is whole
for every rho.
"""

from experiments.configs import default, mqar

SEEDS = tuple(range(10))
LEARNING_RATES = ()
COLUMNS = ("rho",)
RHOS = (1.0, 0.5, 0.0)
CHUNKS = {"trellis": {}, "trellis plain": default.PLAIN, "trellis C=16 stale": mqar.STALE}


def cells():
  """Yields (labels, config) of every setting."""
  for name, chunks in CHUNKS.items():
    for rho in RHOS:
      cfg = mqar.get_config()
      cfg.steps, cfg.optim.warmup_steps = 700, 70
      cfg.model.trellis.update(chunks, outer_gradient=rho)
      cfg.eval.every, cfg.eval.batches = 100, 16
      yield dict(model=name, rho=rho), cfg

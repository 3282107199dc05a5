"""The optimiser: AdamW with warm-up, a decay to choose, clipping, and decay on matrices alone.

lr(n) = peak * warm-up(n) * decay(n),   n = 0, 1, ... the updates already made
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

SCHEDULES = ("cosine", "linear", "wsd")


def schedule(cfg: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
  """Learning rate of update n of `steps`: linear warm-up to the peak, then the decay to the end.

  cosine and linear decay from the end of the warm-up to the last step; wsd (warm-up, stable,
  decay) stays at the peak and falls linearly in the last `decay_steps`. The first update already
  has a rate above zero, and the last one has `peak_lr * end_lr_ratio`.
  """
  decay = cfg.decay_steps if cfg.schedule == "wsd" else steps - cfg.warmup_steps
  start = steps - decay

  def lr(n):
    warm = jnp.minimum(1.0, (n + 1) / max(1, cfg.warmup_steps))
    done = jnp.clip((n + 1 - start) / max(1, decay), 0.0, 1.0)
    left = 0.5 * (1.0 + jnp.cos(jnp.pi * done)) if cfg.schedule == "cosine" else 1.0 - done
    return cfg.peak_lr * warm * (cfg.end_lr_ratio + (1.0 - cfg.end_lr_ratio) * left)

  return lr


def decay_mask(params: Any) -> Any:
  """True for the parameters that weight decay shrinks: matrices, known by their names.

  A name and not a rank decides, because the stacked layers of a scanned model give a bias two axes.
  Norms, biases, the taps of short convolutions and learned memories start at a value that is not
  zero, and keep it. Embeddings are not decayed either, tied ones included: decay shrinks the rows
  of rare tokens between their rare gradients, and small embeddings make large gradients behind the
  first norm.
  """

  def decays(path, _):
    names = [str(key.key) for key in path]
    return names[-1] in ("kernel", "head") and not any(n.startswith("conv") for n in names)

  return jax.tree_util.tree_map_with_path(decays, params)


def optimizer(cfg: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
  """AdamW with fp32 moments: clip by global norm (0 = never), Adam, decoupled decay, schedule."""
  return optax.chain(
    optax.clip_by_global_norm(cfg.clip) if cfg.clip > 0 else optax.identity(),
    optax.adamw(
      schedule(cfg, steps),
      b1=cfg.b1,
      b2=cfg.b2,
      eps=cfg.eps,
      weight_decay=cfg.weight_decay,
      mask=decay_mask,
      mu_dtype=jnp.float32,
    ),
  )

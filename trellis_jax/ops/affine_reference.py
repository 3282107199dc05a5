r"""The definition of `affine`, one token at a time, differentiated by JAX.

R = diag(d_t) S_{t-1}    (or S_{t-1} diag(d_t) for decays over the value axis)
S_t = R + k_t (w_t - b_t R^T k_t)^T,   o_t = S_t^T q_t
"""

import jax
import jax.numpy as jnp


def step(s, q, k, w, log_decay=None, beta=None, *, axis="key", precision=None):
  """Returns (S_t, o_t) of one token.

  Args:
    s: S_{t-1} [B, H, K, V].
    q, k: [B, H, K]; w: [B, H, V].
    log_decay: [B, H] or [B, H, K | V], or None.
    beta: [B, H], or None.
    axis: "key" or "value", that of a vector of decays.
    precision: of the matrix products.
  """
  if log_decay is not None:
    decay = jnp.exp(log_decay)
    if decay.ndim == 2:
      decay = decay[..., None]
    s = s * jnp.expand_dims(decay, -1 if axis == "key" else -2)
  if beta is not None:
    w = w - beta[..., None] * jnp.einsum("bhkv,bhk->bhv", s, k, precision=precision)
  s = s + k[..., :, None] * w[..., None, :]
  return s, jnp.einsum("bhkv,bhk->bhv", s, q, precision=precision)


def forward(q, k, w, log_decay, beta, start, *, axis="key", restart=None, precision=None):
  """Returns (o [B, T, H, V], S [B, H, K, V]); arrays as in `step` with a T axis after B.

  Args:
    q, k, w, log_decay, beta: of the tokens.
    start: S before the first token.
    axis: as in `step`.
    restart: where the state is set to zero ahead of a token [B, T], or None.
    precision: of the matrix products.
  """

  def body(s, token):
    now, restart = token
    if restart is not None:
      s = jnp.where(restart[:, None, None, None], 0, s)
    return step(s, *now, axis=axis, precision=precision)

  xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), ((q, k, w, log_decay, beta), restart))
  s, o = jax.lax.scan(body, start, xs)
  return jnp.moveaxis(o, 0, 1), s

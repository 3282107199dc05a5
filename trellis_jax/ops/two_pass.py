r"""Two passes over one chunk of tokens: the family that Trellis belongs to.

Two memories per head, S_k [M, D] of keys and S_v [M, V] of values, of M slots. Per token:

         ABC                GSA                        Trellis
  S_k <- S_k + a k^T        diag(c) S_k + (1 - c) k^T  b S_k - g u_k k^T
  r    = softmax(S_k q)     softmax(S_k q)             f(S_k q)
  S_v <- S_v + a v^T        diag(c) S_v + (1 - c) v^T  b S_v - g u_v v^T
  o    = S_v^T r            S_v^T r                    phi_out(S_v^T r)

  ABC      a = softmax(W x) says which slots a token goes to, and nothing is ever forgotten
           (Peng et al. 2022, "ABC: attention with bounded-memory control").
  GSA      a slot forgets what it makes room for: c in (0, 1)^M, and a = 1 - c
           (Zhang et al. 2024, "Gated slot attention", eq. 9-11).
  Trellis  what is written depends on what the memory holds: u is the gradient of
           |phi(S w) - a|^2 / 2 at w = k or v, a one target code for both, b and g one gate and
           one step per head (`ops/reference.py`).

ABC and GSA do not read the memory to write it, so each pass is an `affine` recurrence, with c
over the value axis of S_k^T and over the key axis of S_v; this file is these two calls. Trellis
has an op of its own, for u depends on S.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from trellis_jax.ops.affine import affine, flops
from trellis_jax.typing import Array, Keys, Targets, Values


def two_pass(
  q: Keys,
  k: Keys,
  v: Values,
  a: Targets,
  *,
  log_decay: Targets | None = None,
  initial: tuple[Float[Array, "B H M D"], Float[Array, "B H M V"]] | None = None,
  run: Int[Array, "B T"] | None = None,
  chunk_size: int = 64,
) -> tuple[Values, tuple[Float[Array, "B H M D"], Float[Array, "B H M V"]]]:
  """Returns (o in v's dtype, (S_k, S_v) after the last token) of ABC and GSA.

  Args:
    q, k, v: queries, keys, values.
    a: how much of a token goes to each slot [B, T, H, M], 1 - c for GSA.
    log_decay: log c [B, T, H, M]; None keeps all (ABC).
    initial: (S_k, S_v) before the first token; None is zeros.
    run: restarts, as in `affine`.
    chunk_size: as in `affine`.
  """
  s_k, s_v = initial or (None, None)
  s_k = None if s_k is None else jnp.swapaxes(s_k, -1, -2)
  kw = dict(log_decay=log_decay, run=run, chunk_size=chunk_size)
  # In at least fp32: softmax of a sum that grows with the tokens.
  wide = a.astype(jnp.promote_types(a.dtype, jnp.float32))
  y, s_k = affine(q, k, wide, decay_axis="value", initial=s_k, **kw)
  r = jax.nn.softmax(y, axis=-1)
  o, s_v = affine(r, wide, v, decay_axis="key", initial=s_v, **kw)
  return o, (jnp.swapaxes(s_k, -1, -2), s_v)


def two_pass_flops(
  num_tokens: int, num_heads: int, keys: int, values: int, slots: int, chunk_size: int
) -> int:
  """Returns the FLOPs of `two_pass` over one row."""
  widths = ((keys, slots), (slots, values))
  return sum(flops(num_tokens, num_heads, *w, chunk_size=chunk_size) for w in widths)

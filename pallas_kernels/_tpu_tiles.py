r"""Tiles of the TPU kernels: how P heads of C tokens share the lanes of one matrix.

A pack's arrays come in three forms, written here for keys of width W:

  natural [C, P W]   as in memory: a row a token, the heads side by side on lanes;
  columns [M, L]     slots on sublanes and, on lanes, head after head its C tokens (L = P C);
  memory  [M, P W]   slots on sublanes, the heads side by side.

Columns need no padding whatever C is, and sums over slots are plain additions. A product that
would mix heads takes an operand with zeros where the heads differ: `spread` writes a natural array
as rows [L, P W], row (h, t) with head h's lanes alone. Where the result holds more than is wanted
anyway, the operand is `tiled` instead, and `gather` keeps of rows (h, t) the lanes of head h.
Products over one head's width go by groups of 128 lanes, so that none multiplies the zeros of
other groups.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._tpu_activations import Over
from pallas_kernels._tpu_plan import LANES, Plan

NT, NN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))
F32 = jnp.float32


def each(function, *lists):
  """Maps over the packs: stage by stage, so that packs fill each other's waits."""
  return [function(*xs) for xs in zip(*lists)]


class Tiles:
  """The operations on tiles for the sizes of a plan."""

  def __init__(self, plan: Plan):
    self.plan, self.C, self.P, self.L = plan, plan.C, plan.P, plan.L
    row, lane = _iota((self.L, self.L), 0), _iota((self.L, self.L), 1)
    # Token s is seen by token t of the same head; rows t, lanes s.
    self.seen = (row // self.C == lane // self.C) & (row >= lane)

  def low(self, x):
    """Returns x as an operand of products."""
    return x.astype(self.plan.operand)

  def dot(self, x, y, dims=NN):
    """Returns the product in fp32."""
    precision = None if self.plan.bf16 else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
      self.low(x), self.low(y), dims, precision=precision, preferred_element_type=F32
    )

  def groups(self, x):
    """Cuts lanes into groups of 128: [(first head, heads, x's lanes)] of a natural or memory x."""
    width = x.shape[1] // self.P
    heads = max(1, min(self.P, LANES // width))
    return [(h, heads, x[:, h * width : (h + heads) * width]) for h in range(0, self.P, heads)]

  def _own(self, x, heads: int):
    """Rows (head of the group, t) of a group's natural x, with that head's lanes alone."""
    if heads == 1:
      return x
    head = _iota(x.shape, 1) // (x.shape[1] // heads)
    return jnp.concatenate([jnp.where(head == h, x, jnp.zeros_like(x)) for h in range(heads)], 0)

  def spread(self, x):
    """Natural [C, P W] to rows [L, P W] with the own head's lanes alone."""
    return self._own(x, self.P)

  def gather(self, rows, heads: int):
    """Rows [heads C, lanes] of a group to natural [C, lanes]: each head's rows give its lanes."""
    head = _iota((self.C, rows.shape[1]), 1) // (rows.shape[1] // heads)
    out = rows[: self.C]
    for h in range(1, heads):
      out = jnp.where(head == h, rows[h * self.C : (h + 1) * self.C], out)
    return out

  def _by_group(self, function, x):
    """Natural array whose group is `gather` of function(rows of the group's heads, x's lanes)."""
    out = [
      self.gather(function(slice(h * self.C, (h + n) * self.C), lanes), n)
      for h, n, lanes in self.groups(x)
    ]
    return out[0] if len(out) == 1 else jnp.concatenate(out, 1)

  def tiled(self, x):
    """Stacks P copies of natural lanes: rows (any head, t)."""
    return jnp.concatenate([x] * self.P, 0)

  def cross(self, x, y):
    """x_t . y_s of natural x and y in each head, as [t, s]; other pairs hold what is not used."""
    out = [
      self.dot(self._own(lanes, n), self.tiled(other), NT)
      for (_, n, lanes), (_, _, other) in zip(self.groups(x), self.groups(y))
    ]
    return out[0] if len(out) == 1 else jnp.concatenate(out, 0)

  def mix(self, pairs, x):
    """sum_s pairs[t, s] x_s of natural x, natural; pairs are zero where heads differ."""
    return self._by_group(lambda at, lanes: self.dot(pairs[at], self.tiled(lanes)), x)

  def read(self, rows, memory):
    """rows[t] . memory [M, P W] in each head, natural; rows are columns' transpose [L, M]."""
    return self._by_group(lambda at, lanes: self.dot(rows[at], lanes), memory)

  def columns(self, x, size: int):
    """Natural [C, P M] to columns [M, L], by a product with ones that moves and does not round."""
    eye = (_iota((size, x.shape[1]), 0) == _iota((size, x.shape[1]), 1) % size).astype(x.dtype)
    precision = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
      eye, self.spread(x), NT, precision=precision, preferred_element_type=F32
    )

  def natural(self, x, dtype):
    """Columns [M, L] to natural [C, P M] in `dtype`."""
    size = x.shape[0]
    heads = max(1, min(self.P, LANES // size))
    rows, out = x.T, []
    for h in range(0, self.P, heads):
      part = [rows[(h + i) * self.C : (h + i + 1) * self.C] for i in range(heads)]
      out.append(part[0] if heads == 1 else jnp.concatenate(part, 1))
    return (out[0] if len(out) == 1 else jnp.concatenate(out, 1)).astype(dtype)

  def decays(self, gates):
    """exp of the log decay from after s through t, as [t, s], 0 for other pairs.

    gates: the rows [8, L] of `_tpu_layout.Gate`. The exponent's large part is a difference of
    multiples of 1/16, exact, and the small part is small, so nothing cancels.
    """
    at = gates.T
    high, low = at[:, 0:1] - gates[0:1], at[:, 1:2] - gates[1:2]
    return jnp.exp2(jnp.where(self.seen, high + low, -1e30))

  def over_lanes(self, width: int) -> Over:
    """Means over each head's lanes of natural arrays, by products with ones."""

    def mean(x):
      out = []
      for _, _, lanes in self.groups(x):
        size = lanes.shape[1]
        same = _iota((size, size), 0) // width == _iota((size, size), 1) // width
        ones = jnp.where(same, 1 / width, 0.0)
        out.append(self._sum(lanes, ones))
      return out[0] if len(out) == 1 else jnp.concatenate(out, 1)

    return Over(mean, width)

  def _sum(self, x, ones):
    """x @ ones with x in two bfloat16 parts, where products take them: 16 bits of it count."""
    if not self.plan.bf16:
      return self.dot(x, ones)
    high = self.low(x)
    return self.dot(high, ones) + self.dot(x - high.astype(F32), ones)


def _iota(shape, axis: int):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)

r"""Tiles of the TPU kernels: how P heads of C tokens share the lanes of one matrix.

A pack's arrays come in these forms, with L = P C:

  natural [C, P W]   as in memory: a row a token, the heads side by side on lanes;
  columns [M, L]     slots on sublanes and, on lanes, head after head its C tokens;
  memory  [M, P W]   slots on sublanes, the heads side by side;
  pairs   [C, L]     natural, too: row t, and on lanes head after head the tokens s.

Columns need no padding whatever C is, and sums over slots are plain additions. A product that
would mix heads takes one operand with zeros where heads differ: `own` repeats its rows for every
head, each time with that head's lanes alone.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._tpu_activations import Over
from pallas_kernels._tpu_layout import Gate
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
    # What moves tokens between rows and lanes: the transpose unit, which few heads a pack would
    # keep waiting, or products with ones, which many heads a pack would fill with zeros.
    self.transposes = plan.C < 64

  def low(self, x):
    """Returns x as an operand of products."""
    return x.astype(self.plan.operand)

  def dot(self, x, y, dims=NN):
    """Returns the product in fp32."""
    precision = None if self.plan.bf16 else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
      self.low(x), self.low(y), dims, precision=precision, preferred_element_type=F32
    )

  def own(self, x, heads: int | None = None):
    """[R, heads W] to the operand [heads R, heads W]: rows once a head, with its lanes alone.

    Selected in fp32: v5e has no 16-bit masks.
    """
    heads = heads or self.P
    if heads == 1:
      return self.low(x)
    words = x.astype(F32)
    rows, lanes = words.shape
    width, tile = lanes // heads, min(LANES, lanes)
    head = _iota((rows, tile), 1) // width
    zeros = jnp.zeros((rows, tile), words.dtype)

    def part(h, i):
      if (h + 1) * width <= i or i + tile <= h * width:
        return zeros
      part = words[:, i : i + tile]
      return part if tile <= width else jnp.where(head == h - i // width, part, zeros)

    out = [self._side_by_side([part(h, i) for i in range(0, lanes, tile)]) for h in range(heads)]
    out = jnp.concatenate(out, 0)
    return self.low(out)

  def _side_by_side(self, xs):
    return xs[0] if len(xs) == 1 else jnp.concatenate(xs, 1)

  def _groups(self, width: int):
    """Heads whose lanes fill a tile: [(first head, heads, their tokens, their lanes)]."""
    n = max(1, min(self.P, LANES // width))
    cut = lambda h, size: slice(h * size, (h + n) * size)
    return [(h, n, cut(h, self.C), cut(h, width)) for h in range(0, self.P, n)]

  def columns(self, x):
    """Natural [C, P M] to columns [M, L], in fp32."""
    size = x.shape[1] // self.P
    if not self.transposes:
      return self.dot(_same(size, x.shape[1]), self.own(x), NT)
    x = x.astype(F32)
    heads = [x[:, h * size : (h + 1) * size] for h in range(self.P)]
    return jnp.concatenate(heads, 0).T

  def natural(self, x):
    """Columns [M, L] to natural [C, P M], an operand; pairs to those with s and t exchanged."""
    if not self.transposes:
      return self.low(self.dot(_same(self.C, self.L), self.own(x), NT))
    rows = x.T
    tiles = [
      self._side_by_side([rows[i * self.C : (i + 1) * self.C] for i in range(h, h + n)])
      for h, n, _, _ in self._groups(x.shape[0])
    ]
    return self.low(self._side_by_side(tiles))

  def tokens(self, x):
    """Columns [M, L] as the operand of `pairs` and `through`: rows [L, M], or natural."""
    return self.low(x.T) if self.transposes else self.natural(x)

  def _gather(self, rows, n: int):
    """Rows (head, t) of n heads to [C, lanes]: each head's rows give its lanes."""
    head = _iota((self.C, rows.shape[1]), 1) // (rows.shape[1] // n)
    out = rows[: self.C]
    for h in range(1, n):
      out = jnp.where(head == h, rows[h * self.C : (h + 1) * self.C], out)
    return out

  def pairs(self, x, y):
    """x_t . y_s of `tokens` and columns [M, L], as pairs."""
    if not self.transposes:
      return self.dot(x, self.own(y))
    return self._gather(self.dot(x, y), self.P)

  def through(self, x, memory):
    """x_t . memory of each head, of `tokens` and a memory [M, P W]: natural [C, P W]."""
    m = memory.shape[0]
    out = []
    for h, n, tokens, lanes in self._groups(memory.shape[1] // self.P):
      if self.transposes:
        out.append(self._gather(self.dot(x[tokens], memory[:, lanes]), n))
      else:
        out.append(self.dot(x[:, h * m : (h + n) * m], self.own(memory[:, lanes], n)))
    return self._side_by_side(out)

  def cross(self, x, rows):
    """x_t . y_s of natural x and y, the latter as `own` rows: pairs."""
    groups = self._groups(x.shape[1] // self.P)
    return self._side_by_side(
      [self.dot(x[:, lanes], rows[tokens, lanes], NT) for _, _, tokens, lanes in groups]
    )

  def mix(self, pairs, rows):
    """sum_s pairs[t, s] y_s of natural y as `own` rows: natural."""
    groups = self._groups(rows.shape[1] // self.P)
    return self._side_by_side(
      [self.dot(pairs[:, tokens], rows[tokens, lanes]) for _, _, tokens, lanes in groups]
    )

  def decays(self, gates, before: bool = False):
    """exp of the log decay from after s through t, or to just before t, as pairs; else 0.

    gates: the rows of `_tpu_layout.Gate`. The exponent's large part is a difference of
    multiples of 1/16, exact, and the small part is small, so nothing cancels; bfloat16 operands
    hide more than what fp32 alone loses.
    """
    shape = (self.C, self.L)
    head, s = _iota(shape, 1) // self.C, _iota(shape, 1) % self.C

    def less(to, row):
      column = jnp.broadcast_to(to, (8, self.L)).T[:, 0:1]
      at_t = column[: self.C]
      for h in range(1, self.P):
        at_t = jnp.where(head == h, column[h * self.C : (h + 1) * self.C], at_t)
      return at_t - row

    row = lambda which: gates[which : which + 1]
    high, low = row(Gate.HIGH), row(Gate.LOW)
    to_high, to_low = (row(Gate.BEFORE_HIGH), row(Gate.BEFORE_LOW)) if before else (high, low)
    if self.plan.bf16:
      exponent = less(to_high + to_low, high + low)
    else:
      exponent = less(to_high, high) + less(to_low, low)
    t = _iota(shape, 0)
    return jnp.exp2(jnp.where(t > s if before else t >= s, exponent, -1e30))

  def inverses(self, pairs):
    """(I + A)^-1 - I for strictly lower A, all packs' pairs, by halving (`ops/triangular.py`).

    All blocks of a size at once: with I + X inverse up to blocks of n tokens, and B what A has
    below them in blocks of 2 n, X <- X - (I + X) B (I + X). That changes every second block's rows,
    and those alone are multiplied where they are whole tiles.
    """
    shape = (self.C, self.L)
    t, s = _iota(shape, 0), _iota(shape, 1) % self.C
    below = lambda a, n: jnp.where((t // n == s // n + 1) & (t // n % 2 == 1), a, 0.0)
    x, n = [-below(a, 1) for a in pairs], 2
    while n < self.C:
      whole = n % 8 != 0
      cut = lambda x, odd: [x[i : i + n] for i in range(n * odd, self.C, 2 * n)]
      rows = lambda x: x if whole else jnp.concatenate(cut(x, 1), 0)
      b = each(lambda a: below(a, n), pairs)
      y = each(lambda x, b: rows(b) + self.dot(rows(x), self.own(b)), x, b)
      new = each(lambda x, y: rows(x) - y - self.dot(y, self.own(x)), x, y)
      if not whole:
        new = each(lambda x, z: self._alternate(cut(x, 0), z), x, new)
      x, n = new, 2 * n
    return x

  def _alternate(self, even, odd):
    """Blocks of rows, every second one from the rows `odd`."""
    n = even[0].shape[0]
    odd = [odd[i : i + n] for i in range(0, odd.shape[0], n)]
    return jnp.concatenate([x for pair in zip(even, odd) for x in pair], 0)

  def over_slots(self) -> Over:
    """Means over the slots of columns."""
    size = self.plan.M
    return Over(lambda x: jnp.sum(x, axis=0, keepdims=True) * (1 / size), size, self.plan.bf16)

  def over_lanes(self) -> Over:
    """Means over each head's lanes of natural arrays of V, by products with ones."""
    width = self.plan.V
    tile = min(LANES, self.P * width)
    same = _iota((tile, tile), 0) // width == _iota((tile, tile), 1) // width
    ones = jnp.where(same, 1 / width, 0.0)

    def mean(x):
      cut = [x[:, i : i + tile] for i in range(0, x.shape[1], tile)]
      return self._side_by_side([self.dot(lanes, ones) for lanes in cut])

    return Over(mean, width, self.plan.bf16)


def _same(size: int, lanes: int):
  """Ones where a lane's number within its head is the row's."""
  return _iota((size, lanes), 0) == _iota((size, lanes), 1) % size


def _iota(shape, axis: int):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)

"""What a program of the TPU kernels sees of each array: blocks of rows and packs of heads.

A block is [R, n, lanes]: R rows of the batch, n tokens, slots or gates, and the lanes of G packs.
In the kernels it is a list of the R G packs, row after row.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._tpu_plan import Plan

# Rows of an fp32 tile: as many chunks share a block of decays.
SUBLANES = 8
PARAMS = pltpu.CompilerParams(
  dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=64 << 20
)
WHOLE = slice(None)


def _packs(plan: Plan, ref):
  """(row, lanes) of each pack; a block that all rows share gives its packs R times."""
  width = ref.shape[-1] // plan.G
  shared = ref.shape[0] == 1
  for r in range(plan.R):
    for i in range(plan.G):
      yield 0 if shared else r, slice(i * width, (i + 1) * width)


def load(plan: Plan, ref, at=WHOLE):
  """Returns the packs of a block, of its rows `at`."""
  return [ref[r, at][:, lanes] for r, lanes in _packs(plan, ref)]


def store(plan: Plan, ref, xs, at=WHOLE):
  """Writes the packs of a block, at its rows `at`."""
  for x, (r, lanes) in zip(xs, _packs(plan, ref)):
    ref[r, at, lanes] = x.astype(ref.dtype)


def store_row(plan: Plan, ref, xs, at):
  """Writes the packs [1, lanes] into row `at` of a block of SUBLANES."""
  for x, (r, lanes) in zip(xs, _packs(plan, ref)):
    before = ref[r, :, lanes]
    here = jax.lax.broadcasted_iota(jnp.int32, before.shape, 0) == at
    ref[r, :, lanes] = jnp.where(here, x, before)


class Blocks:
  """Makes the block specs of a plan whose step c takes the chunks of block `index(c)`."""

  def __init__(self, plan: Plan, index):
    self.plan, self.index = plan, index

  def _spec(self, rows, width, row_block):
    at = lambda b, n, c, *_: (b, row_block(c), n)
    return pl.BlockSpec((self.plan.R, rows, self.plan.lanes(width)), at)

  def tokens(self, width):
    return self._spec(self.plan.K * self.plan.C, width, self.index)

  def gates(self):
    return self._spec(self.plan.K * self.plan.gates, self.plan.C, self.index)

  def decays(self, width):
    return self._spec(SUBLANES, width, lambda c: self.index(c) * self.plan.K // SUBLANES)

  def starts(self, width):
    return self._spec(self.plan.K * self.plan.M, width, self.index)

  def memory(self, width):
    return self._spec(self.plan.M, width, lambda c: 0)

  def init(self, width):
    return pl.BlockSpec((1, self.plan.M, self.plan.lanes(width)), lambda b, n, c, *_: (0, 0, n))

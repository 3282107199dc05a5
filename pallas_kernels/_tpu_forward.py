"""The forward kernel: chunks one after the other, both passes of a chunk at once.

Grid (rows, programs, steps of K chunks); a program holds G packs of heads. The memories live in
the output block of the final ones, which stays in VMEM from step to step. Each chunk's start is
written as it enters the products: a backward's starting point, and where the last token's chunk
started.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu_blocks as blocks
from pallas_kernels import _tpu_chunk as chunk
from pallas_kernels import _tpu_plan as plans
from pallas_kernels._tpu_blocks import SUBLANES
from pallas_kernels._tpu_plan import Plan
from pallas_kernels._tpu_tiles import F32, Tiles, each

NAME = "trellis_forward"
# (packs, chunks) of a program for each chunk length.
SIZE = {16: (8, 4), 32: (8, 4), 64: (16, 4)}


def _kernel(last_ref, *refs, plan: Plan, spec, restarts: bool, save: bool):
  names = iter(refs)
  take = lambda n: [next(names) for _ in range(n)]
  q_ref, k_ref, v_ref, a_ref, gates_ref = take(5)
  keep_refs, renew_refs = take(2), take(2) if restarts else None
  start_refs, init_refs = take(2), take(2) if restarts else None
  o_ref, *end_refs = take(3)
  kept_refs, at_start_refs = take(2), take(2)
  step, t = pl.program_id(2), Tiles(plan)
  load = functools.partial(blocks.load, plan)

  @pl.when(step == 0)
  def _():
    for end, start in zip(end_refs, start_refs):
      end[...] = start[...]

  inits = [load(ref) for ref in init_refs] if restarts else (None, None)

  def one(i, carry):
    at = lambda n: pl.ds(pl.multiple_of(i * n, n), n)
    token = at(plan.C)
    q, k, v, a = (load(ref, token) for ref in (q_ref, k_ref, v_ref, a_ref))
    gates = load(gates_ref, at(plan.gates))
    this = pl.ds((step * plan.K + i) % SUBLANES, 1)
    decay = lambda refs, j: None if refs is None else load(refs[j], this)
    memories = [load(ref) for ref in end_refs]
    targets = each(t.columns, a)
    both = [
      chunk.write(t, spec, w, targets, gates, s, s0) for w, s, s0 in zip((k, v), memories, inits)
    ]
    ends = [
      chunk.ended(t, gates, s, s0, (decay(keep_refs, j), decay(renew_refs, j)), w)
      for j, (s, s0, w) in enumerate(zip(memories, inits, both))
    ]
    o = chunk.read(t, spec, q, gates, *both).o
    for ref, w in zip(at_start_refs, both):
      blocks.store(plan, ref, w.low, at(plan.M))
    blocks.store(plan, o_ref, o, token)
    for ref, s in zip(end_refs, ends):
      blocks.store(plan, ref, s)
    return carry

  jax.lax.fori_loop(0, plan.K, one, None)
  for r in range(plan.R):
    last = last_ref[pl.program_id(0) * plan.R + r]

    @pl.when(last // plan.K == step)
    def _(r=r, last=last):
      at = pl.ds(pl.multiple_of(last % plan.K * plan.M, plan.M), plan.M)
      for kept, starts in zip(kept_refs, at_start_refs):
        kept[r] = starts[r, at].astype(F32)


def call(plan: Plan, spec, arrays, last, save: bool):
  """Runs the kernel.

  Args:
    plan: sizes.
    spec: activations and their eps.
    arrays: in the kernel's layout: (q, k, v, alpha, gates), keep of D and V lanes, renew or (),
      start, init or ().
    last: [B] the chunk of each row's last token.
    save: whether the chunks' starts are an output.

  Returns:
    (o, (end_k, end_v), (kept_k, kept_v), starts (k, v) or None).
  """
  inputs, keep, renew, start, init = arrays
  b, slots = inputs[0].shape[:2]
  heads = plan.heads[1]
  widths = (plan.D, plan.V)
  of = blocks.Blocks(plan, lambda c: c)
  shape = jax.ShapeDtypeStruct
  memory = [shape((b, plan.M, heads * w), F32) for w in widths]
  starts = [shape((b, plan.chunks * plan.M, heads * w), plan.operand) for w in widths]
  in_specs = [of.tokens(w) for w in (plan.D, plan.D, plan.V, plan.M)] + [of.gates()]
  in_specs += [of.decays(w) for w in widths] * (2 if renew else 1)
  in_specs += [of.memory(w) for w in widths]
  in_specs += [of.init(w) for w in widths] if init else []
  out_shape = [shape((b, slots, heads * plan.V), inputs[2].dtype), *memory, *memory]
  out_specs = [of.tokens(plan.V)] + [of.memory(w) for w in widths] * 2
  scratch = []
  if save:
    out_shape += starts
    out_specs += [of.starts(w) for w in widths]
  else:
    rows = plan.K * plan.M
    scratch = [pltpu.VMEM((plan.R, rows, plan.lanes(w)), plan.operand) for w in widths]
  kernel = functools.partial(_kernel, plan=plan, spec=spec, restarts=bool(init), save=save)
  out = pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(b // plan.R, plan.programs, plan.chunks // plan.K),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    out_shape=out_shape,
    compiler_params=blocks.PARAMS,
    interpret=plans.interpret(),
    name=NAME,
  )(jnp.maximum(last, 0).astype(jnp.int32), *inputs, *keep, *renew, *start, *init)
  return out[0], tuple(out[1:3]), tuple(out[3:5]), tuple(out[5:7]) if save else None

r"""The sequential kernels: both memories evolve from chunk to chunk, and back.

One program per row, head and pass (keys, values). With write vectors W, targets A, steps g and the
decays to the chunk's end `end` and `total`:

  Z = W S^T,   U = J_phi(Z)^T (phi(Z) - A),   S <- total S - (end g U)^T W

and in reverse, with X the cotangent of g U, GU_bar what the reads gave of it, and S'_bar that of
the memory after the chunk:

  X = GU_bar - end (W S'_bar^T),   Z_bar = rho (vjp of U at g X),   S_bar = total S'_bar + Z_bar^T W

plus what the reads of a block gave of S. Linearised chunks of curvature h have, with X of
`_triton_solvers` and the decay `before` from the chunk's start to just before the token,

  R = J_phi(Z)^T (phi(Z) - A) + h (before - 1) Z,   U = R + X R

and in reverse X <- X + (that of the way back)^T X, Z_bar += rho h (before - 1) g X.

Memories leave the forward at the start of every block of BLOCK tokens, their cotangents leave the
reverse at its end: given U and Z_bar both are linear, so all the rest is parallel over blocks,
whatever the chunk length.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _triton_activations as activations
from pallas_kernels import _triton_decays as decays
from pallas_kernels._triton_call import BLOCK, NN, NT, TN, call, dot, in_parts, short, tile, wait

# Rows of the numbers per token and per chunk.
STEP, END, ENTERED = range(3)
BEHIND = -1  # the last one, of linearised chunks: before - 1
TOTAL, SURVIVES = range(2)


def _launch(plan, m: int, width: int, backward: bool) -> tuple[int, int, int]:
  """Returns (tokens of a chunk that a program takes at a time, warps, stages): registers suffice.

  `benchmarks/results/kernel_gpu.md` has what each takes.
  """
  size, fp32 = m * width, plan.operand == jnp.float32
  most = 64 * 64 * 64 // size if backward else 64 if m <= 64 else 32
  full = (fp32 or (plan.runs and not backward)) and size > 64 * 128
  if fp32 or full:
    most = max(16, most // (4 if fp32 and plan.runs else 2))
  if plan.curvature and (backward or plan.runs):
    most = max(16, most // 2)
  stages = 1 if full and plan.chunk == 16 else 2
  return min(plan.chunk, most), 4 if size <= 64 * 64 and not backward else 8, stages


def scalars(plan, log_beta, gamma, run):
  """Returns ([B H rows N] by token, [B H 1|2 n] by chunk) of the gates [B H N]; see the rows."""
  by_chunk = decays.of(log_beta, run, plan.chunk)
  tokens = [plan.step(gamma), by_chunk.end().reshape(gamma.shape)]
  chunks = [by_chunk.carry[..., -1]]
  if plan.runs:
    entered = jnp.broadcast_to(by_chunk.entered, by_chunk.hi.shape).astype(jnp.float32)
    tokens.append(entered.reshape(gamma.shape))
    chunks.append(entered[..., -1])
  if plan.curvature:
    tokens.append(decays.before(by_chunk, run).carry.reshape(gamma.shape) - 1)
  return jnp.stack(tokens, 2).astype(jnp.float32), jnp.stack(chunks, 2).astype(jnp.float32)


def _parts(plan, part: int, write, s):
  """Returns s after `write(j, s)` for all parts of `part` tokens of a chunk."""
  count = plan.chunk // part
  return write(0, s) if count == 1 else jax.lax.fori_loop(0, count, write, s)


def _solve(plan, part, at, y_ref, x_ref, back: bool, use, s):
  """Runs s <- use(tokens, Y + X Y, s), or X^T if `back`, for all parts of a chunk.

  `y_ref` holds Y. What comes of a part may take its place there: parts that need it are done.
  """
  count, first = plan.chunk // part, jax.lax.rem(at, BLOCK)
  rows, columns = (lambda j, start=start: pl.ds(start + j * part, part) for start in (at, first))

  def some(i, s):
    j = i if back else count - 1 - i

    def add(k, y):
      x = x_ref[rows(k), columns(j)] if back else x_ref[rows(j), columns(k)]
      return y + dot(plan, x, y_ref[rows(k)], TN if back else NN)

    y = y_ref[rows(j)].astype(jnp.float32)
    y = jax.lax.fori_loop(j if back else 0, count if back else j + 1, add, y)
    wait(plan)
    return use(rows(j), y, s)

  return jax.lax.fori_loop(0, count, some, s)


def _keep_start(plan, c, at, last, s, states_ref, kept_ref):
  """Stores the memory at chunk c's start, token `at`, if a block starts there or c is the last."""
  if plan.chunk == BLOCK:
    states_ref[c] = s.astype(states_ref.dtype)
  else:

    @pl.when(jax.lax.rem(at, BLOCK) == 0)
    def _():
      states_ref[jax.lax.div(at, BLOCK)] = s.astype(states_ref.dtype)

  @pl.when(c == last)
  def _():
    kept_ref[...] = s


def _forward_pass(plan, part, num_slots, rows, chunks, last, a_ref, w_ref, x_ref, memories, outs):
  start, init, operand = memories
  gu_ref, z_ref, states_ref, end_ref, kept_ref = outs
  behind_row, count = rows.shape[0] + BEHIND, plan.chunk // part

  def body(c, s):
    at = c * plan.chunk
    _keep_start(plan, c, at, last, s, states_ref, kept_ref)
    anchor = s.astype(plan.operand)
    # So many parts hold the chunk's start too long for the registers; it has just been stored.
    stored = plan.chunk == BLOCK and count >= 4
    if stored:
      wait(plan)
    # Elsewhere it need not outlive the codes, if those of all parts come first.
    codes_first = short(plan, *init.shape) and not stored
    tokens_of = lambda j: pl.ds(at + j * part, part)

    def codes(j):
      tokens = tokens_of(j)
      w, a = w_ref[tokens], a_ref[tokens].astype(jnp.float32)
      z = dot(plan, w, states_ref[c] if stored else anchor, NT)
      if plan.runs:
        entered = rows[ENTERED, tokens]
        behind = lambda z, of_init: jnp.where(entered[:, None] > 0, z, of_init)
        if codes_first:
          both = lambda z: behind(z, in_parts(plan, operand, w_ref, NT, tokens).T)
          z = jax.lax.cond(jnp.min(entered) > 0, lambda z: z, both, z)
        else:
          z = behind(z, dot(plan, w, operand[...], NT))
      u = activations.inner_gradient(plan, plan.phi, z, a, plan.phi_eps)
      if z_ref is not None:
        z_ref[tokens] = z.astype(z_ref.dtype)
      if plan.curvature:
        u = u + plan.curvature * rows[behind_row, tokens][:, None] * z
        if count > 1:
          gu_ref[tokens] = u.astype(gu_ref.dtype)
          return u, w
        u = u + dot(plan, x_ref[tokens, pl.ds(jax.lax.rem(at, BLOCK), part)], u)
      return stepped(tokens, u), w

    def stepped(tokens, u):
      gu = rows[STEP, tokens][:, None] * u
      gu_ref[tokens] = gu.astype(gu_ref.dtype)
      return gu

    def only_codes(j, nothing):
      codes(j)

    change = lambda tokens, s, gu, w: s - dot(plan, rows[END, tokens][:, None] * gu, w, TN)
    solved = lambda tokens, u, s: change(tokens, s, stepped(tokens, u), w_ref[tokens])
    write = lambda j, s: change(tokens_of(j), s, *codes(j))
    if codes_first and count == 1:
      # Not through memory: Triton may load for the next chunk what this one has not stored yet.
      of_chunk = codes(0)
      write = lambda j, s: change(tokens_of(j), s, *of_chunk)
    elif count > 1 and (codes_first or plan.curvature):
      jax.lax.fori_loop(0, count, only_codes, None)
      wait(plan)
      write = lambda j, s: change(tokens_of(j), s, gu_ref[tokens_of(j)], w_ref[tokens_of(j)])
    if plan.runs:
      s = jax.lax.cond(chunks[SURVIVES, c] > 0, lambda s: s, lambda s: init[...], s)
    s = chunks[TOTAL, c] * s
    if plan.curvature and count > 1:
      return _solve(plan, part, at, gu_ref, x_ref, False, solved, s)
    return _parts(plan, part, write, s)

  kept_ref[...] = jnp.zeros(kept_ref.shape, kept_ref.dtype)
  end_ref[...] = jax.lax.fori_loop(0, num_slots // plan.chunk, body, start[...])


def forward(plan, k, v, alpha, tokens, chunks, last, start, init, solvers, save: bool):
  """Runs both passes over all chunks.

  Args:
    plan: the static choices.
    k, v, alpha: [B N H D | V | M], N a multiple of BLOCK.
    tokens, chunks: from `scalars`.
    last: the chunk [B] whose start is wanted in fp32.
    start: (S_k, S_v) [B H M D | V] fp32.
    init: (S_k, S_v) [H M D | V] fp32 after a restart.
    solvers: a pair [B H N BLOCK] from `_triton_solvers`, or () for stale chunks.
    save: whether the codes Z are wanted.

  Returns:
    (g U [2 B H N M], Z or None, states at the block starts, end, kept), memories in pairs.
  """
  b, num_slots, h, d = k.shape
  width, m, blocks = v.shape[-1], alpha.shape[-1], num_slots // BLOCK
  part, warps, stages = _launch(plan, m, max(d, width), backward=False)

  def trellis_evolve(tokens, chunks, last, a, *refs):
    by_pass, outs = refs[:8], refs[8 + len(solvers) :]
    solver = refs[8 : 8 + len(solvers)] or (None, None)
    gu, z, of_pass = outs[0], outs[1] if save else None, outs[1 + save :]
    for i in range(2):
      w, *memories = by_pass[i::2]

      @pl.when(pl.program_id(2) == i)
      def _(w=w, x=solver[i], memories=memories, outs=(gu, z, *of_pass[i::2])):
        _forward_pass(plan, part, num_slots, tokens, chunks, last[0], a, w, x, memories, outs)

  row = lambda *shape: tile((None, None, *shape), lambda h, b, p: (b, h, *(0,) * len(shape)))
  head = lambda *shape: tile((None, *shape), lambda h, b, p: (h, 0, 0))
  slots = lambda width: tile((None, num_slots, None, width), lambda h, b, p: (b, 0, h, 0))
  codes = tile((None, None, None, num_slots, m), lambda h, b, p: (p, b, h, 0, 0))
  fp32, store = jnp.float32, plan.operand
  all_codes = [((2, b, h, num_slots, m), store)] * (1 + save)
  states = [((b, h, blocks, m, w), store) for w in (d, width)]
  ends = [((b, h, m, w), fp32) for w in (d, width)] * 2
  operands = [s.astype(plan.operand) for s in init]
  outs = call(
    plan,
    trellis_evolve,
    (h, b, 2),
    [row(*tokens.shape[2:]), row(*chunks.shape[2:]), tile((1,), lambda h, b, p: (b,))]
    + [slots(m), slots(d), slots(width), row(m, d), row(m, width)]
    + [head(m, d), head(m, width)] * 2
    + [row(num_slots, BLOCK)] * len(solvers),
    [codes] * (1 + save) + [row(*s[0][2:]) for s in (*states, *ends)],
    [*all_codes, *states, *ends],
    warps=warps,
    stages=stages,
  )(tokens, chunks, last, alpha, k, v, *start, *init, *operands, *solvers)
  gu, *rest = outs
  z = rest.pop(0) if save else None
  return gu, z, tuple(rest[:2]), tuple(rest[2:4]), tuple(rest[4:])


def _reverse_pass(
  plan, part, num_slots, rows, chunks, a_ref, z_ref, gu_bar_ref, w_ref, solver_ref, refs
):
  from_reads, end_bar, x_ref, states_bar_ref, start_bar_ref = refs
  count = num_slots // plan.chunk
  behind_row, follows = rows.shape[0] + BEHIND, bool(plan.curvature and plan.rho)

  def body(i, s_bar):
    c = count - 1 - i
    at = c * plan.chunk
    block = jax.lax.div(at, BLOCK)
    add = lambda s: s + from_reads[block].astype(jnp.float32)
    if plan.chunk == BLOCK:
      states_bar_ref[c] = s_bar.astype(states_bar_ref.dtype)
    else:

      @pl.when(jax.lax.rem(at + plan.chunk, BLOCK) == 0)
      def _():
        states_bar_ref[block] = s_bar.astype(states_bar_ref.dtype)

    seen = s_bar.astype(plan.operand)

    def write(j, s_bar):
      tokens = pl.ds(at + j * part, part)
      w = w_ref[tokens]
      x = gu_bar_ref[tokens].astype(jnp.float32)
      x = x - rows[END, tokens][:, None] * dot(plan, w, seen, NT)
      if follows and part == plan.chunk:
        mine = solver_ref[tokens, pl.ds(jax.lax.rem(at, BLOCK), part)]
        x = x + dot(plan, mine, x, TN)
      x_ref[tokens] = x.astype(x_ref.dtype)
      if not plan.rho or (follows and part < plan.chunk):
        return s_bar
      return written(tokens, x, w, s_bar)

    def solved(tokens, x, s_bar):
      x_ref[tokens] = x.astype(x_ref.dtype)
      return written(tokens, x, w_ref[tokens], s_bar)

    def written(tokens, x, w, s_bar):
      z, a = z_ref[tokens].astype(jnp.float32), a_ref[tokens].astype(jnp.float32)
      u_bar = rows[STEP, tokens][:, None] * x
      _, z_bar, _ = activations.inner_gradient_vjp(plan, plan.phi, z, a, u_bar, plan.phi_eps)
      if plan.curvature:
        z_bar = z_bar + plan.curvature * rows[behind_row, tokens][:, None] * u_bar
      if plan.runs:
        z_bar = jnp.where(rows[ENTERED, tokens][:, None] > 0, z_bar, 0)
      return s_bar + dot(plan, plan.rho * z_bar, w, TN)

    if plan.runs:
      s_bar = jnp.where(chunks[SURVIVES, c] > 0, s_bar, 0)
    s_bar = _parts(plan, part, write, chunks[TOTAL, c] * s_bar)
    if follows and part < plan.chunk:
      wait(plan)
      s_bar = _solve(plan, part, at, x_ref, solver_ref, True, solved, s_bar)
    if plan.chunk == BLOCK:
      return add(s_bar)
    return jax.lax.cond(jax.lax.rem(at, BLOCK) == 0, add, lambda s: s, s_bar)

  start_bar_ref[...] = jax.lax.fori_loop(0, count, body, end_bar[...])


def reverse(plan, k, v, alpha, tokens, chunks, z, gu_bar, states_bar, end_bar, solvers):
  """Runs both passes over all chunks, the last one first.

  Args:
    plan, k, v, alpha, tokens, chunks: as in `forward`.
    z: [2 B H N M], what `forward` saved.
    gu_bar: a pair [B H N M], what the reads gave of g U.
    states_bar: (S_k, S_v) [B H blocks M D | V], what the reads gave of the block starts.
    end_bar: (S_k, S_v) [B H M D | V] fp32.
    solvers: as in `forward`, those of the way back.

  Returns:
    (X [2 B H N M], cotangents of the memories at the block ends, start_bar), memories in pairs.
  """
  b, num_slots, h, d = k.shape
  width, m = v.shape[-1], alpha.shape[-1]
  part, warps, stages = _launch(plan, m, max(d, width), backward=True)

  def trellis_evolve_backward(tokens, chunks, a, z, *refs):
    pairs, (x, *outs) = refs[:8], refs[8 + len(solvers) :]
    solver = refs[8 : 8 + len(solvers)] or (None, None)
    for i in range(2):

      @pl.when(pl.program_id(2) == i)
      def _(
        gu_bar=pairs[i], w=pairs[2 + i], solver=solver[i], refs=pairs[4 + i :: 2], outs=outs[i::2]
      ):
        refs = (*refs, x, *outs)
        _reverse_pass(plan, part, num_slots, tokens, chunks, a, z, gu_bar, w, solver, refs)

  row = lambda *shape: tile((None, None, *shape), lambda h, b, p: (b, h, *(0,) * len(shape)))
  slots = lambda width: tile((None, num_slots, None, width), lambda h, b, p: (b, 0, h, 0))
  codes = tile((None, None, None, num_slots, m), lambda h, b, p: (p, b, h, 0, 0))
  states = [(s.shape, plan.operand) for s in states_bar]
  starts = [(s.shape, jnp.float32) for s in end_bar]
  x, *rest = call(
    plan,
    trellis_evolve_backward,
    (h, b, 2),
    [row(*tokens.shape[2:]), row(*chunks.shape[2:]), slots(m), codes]
    + [row(num_slots, m)] * 2
    + [slots(d), slots(width)]
    + [row(*s.shape[2:]) for s in (*states_bar, *end_bar)]
    + [row(num_slots, BLOCK)] * len(solvers),
    [codes] + [row(*s[0][2:]) for s in (*states, *starts)],
    [(z.shape, plan.operand), *states, *starts],
    warps=warps,
    stages=stages,
  )(tokens, chunks, alpha, z, *gu_bar, k, v, *states_bar, *end_bar, *solvers)
  return x, tuple(rest[:2]), tuple(rest[2:])

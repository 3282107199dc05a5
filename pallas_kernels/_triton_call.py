"""What the Triton kernels share: the static plan of a call, matrix products, the launch.

Pallas' Triton backend is deprecated from jax 0.11 on and is the one that runs on GPUs today, so
every launch names it by its `CompilerParams`, and its warning is silenced here and nowhere else.
"""

import contextlib
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

warnings.filterwarnings("ignore", message=".*Triton.*deprecated.*", category=DeprecationWarning)

LEAST_STEP = 1e-20  # of linearised chunks, whose backward divides by it
BLOCK = 64  # tokens that one program of the parallel kernels takes
NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
_interpreting = False


class Plan(NamedTuple):
  """The static choices of a call.

  chunk: C; operand: dtype of the products' operands and of what goes through memory; runs: whether
  rows have restarts; interpret: run as JAX operations; the others are the op's own.
  """

  chunk: int
  operand: jnp.dtype
  runs: bool
  interpret: bool
  precision: jax.lax.Precision | None
  phi: str
  f: str
  phi_out: str
  phi_eps: float
  eps: float
  rho: float
  curvature: float

  @classmethod
  def of(cls, spec, dtype, runs: bool) -> "Plan":
    """Returns the plan of the op's `spec` for values of `dtype`."""
    knobs = (spec.phi, spec.f, spec.phi_out, spec.phi_eps, spec.eps)
    knobs += spec.outer_gradient, spec.curvature
    chunk, precision = spec.chunk_size, spec.precision
    return cls(chunk, jnp.dtype(dtype), runs, _interpreting, precision, *knobs)

  @property
  def fast(self) -> bool:
    """Whether sigmoids may be as coarse as the operands are."""
    return self.operand == jnp.bfloat16

  def step(self, gamma):
    """The inner steps as the kernels take them: in linearised chunks u is had from g u again."""
    return jnp.maximum(gamma, LEAST_STEP) if self.curvature else gamma


@contextlib.contextmanager
def interpreted():
  """Runs the kernels as JAX operations on any platform, while tracing inside of the context."""
  global _interpreting
  before, _interpreting = _interpreting, True
  try:
    yield
  finally:
    _interpreting = before


def interpreting() -> bool:
  """Whether `interpreted` is in force."""
  return _interpreting


def dot(plan: Plan, x, y, dims=NN):
  """Returns the fp32 product of two tiles, whose operands are rounded to `plan.operand`."""
  precision = plan.precision
  if plan.operand == jnp.float32 and not plan.interpret and precision is not None:
    # The IEEE product has no tensor cores and spills; three TF32 products are as exact as fp32.
    x3 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    precision = None if precision == jax.lax.Precision.DEFAULT else x3
  x, y = x.astype(plan.operand), y.astype(plan.operand)
  return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def columns_at_a_time(plan: Plan) -> int:
  """Returns how many columns of a tile are taken at once where registers are short.

  A whole operand of the widest shapes is more than they hold beside all else.
  """
  if plan.operand == jnp.float32:
    return 16 if plan.runs else 32
  return 64


def short(plan: Plan, *widths: int) -> bool:
  """Whether registers are shortest: fp32 operands and restarts, with tiles wider than 64."""
  return plan.runs and plan.operand == jnp.float32 and max(widths) > 64


def in_parts(plan: Plan, x_ref, y_ref, dims, mine=None):
  """Returns the product, NN or NT, of what two references hold, a few columns of x at a time.

  `mine` is the slice of the product's columns that is wanted, None for all.
  """
  (rows, columns), by_rows = x_ref.shape, dims == NN
  width = y_ref.shape[by_rows] if mine is None else mine.size
  mine = slice(None) if mine is None else mine
  part = columns_at_a_time(plan)
  if part >= columns:
    return dot(plan, x_ref[...], y_ref[:, mine] if by_rows else y_ref[mine], dims)

  def add(i, z):
    at = pl.ds(i * part, part)
    return z + dot(plan, x_ref[:, at], y_ref[at, mine] if by_rows else y_ref[mine, at], dims)

  start = jnp.zeros((rows, width), jnp.float32)
  return jax.lax.fori_loop(0, columns // part, add, start)


def seen(product, entered, s_ref, init_ref):
  """Returns the product with the memory that its rows see: S, or the initial one if not `entered`.

  `entered` is fp32 [rows], or None without restarts; most tiles have no restart and one product.
  """
  y = product(s_ref)
  if entered is None:
    return y
  both = lambda y: jnp.where(entered[:, None] > 0, y, product(init_ref))
  return jax.lax.cond(jnp.min(entered) > 0, lambda y: y, both, y)


def through(plan: Plan, ref, x):
  """Returns x as it is after being stored in `ref`, which every warp then reads.

  Triton lets each warp own whole rows of a product that feeds another one, so with more warps than
  rows of 16 they all hold the same. What comes from memory starts anew.
  """
  ref[...] = x.astype(ref.dtype)
  wait(plan)
  return ref[...]


def wait(plan: Plan):
  """Waits until every warp has come here, and what it stored can be read."""
  if not plan.interpret:
    pltriton.debug_barrier()


def call(
  plan: Plan,
  kernel,
  grid,
  in_specs,
  out_specs,
  out_shape,
  *,
  warps: int,
  stages: int,
  aliases=None,
  name: str = "",
):
  """Returns the launch of `kernel` as a function of its arrays.

  Args:
    plan: says whether to interpret.
    kernel: takes one reference per input and then one per output.
    grid: programs, at most three axes, neighbours along the first.
    in_specs, out_specs: block shapes with their index maps, see `tile`.
    out_shape: (shape, dtype) of each output.
    warps, stages: Triton's, per program and per pipelined loop.
    aliases: input -> output, by position, that are one array.
    name: of the launch; "" is the kernel's.
  """
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=[jax.ShapeDtypeStruct(*x) for x in out_shape],
    compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
    input_output_aliases=aliases or {},
    interpret=plan.interpret,
    name=name or kernel.__name__,
  )


def tile(shape, index):
  """Returns the spec of a block; None in `shape` is one index of that axis, dropped."""
  return pl.BlockSpec(shape, index)

"""The GPU kernels: numbers by Pallas' interpreter, programs lowered for CUDA.

Where JAX has a GPU (JAX_PLATFORMS=cuda) the numbers are those of the compiled kernels instead.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import mixer_step
import numpy as np
import op_cases
import pytest
from jax.sharding import AxisType

from benchmarks import kernel_gpu
from pallas_kernels import _triton_activations, _triton_decays, triton_gpu
from pallas_kernels._triton_call import Plan
from trellis_jax import trellis
from trellis_jax.ops import activations, backends, decay
from trellis_jax.ops.affine import affine
from trellis_jax.ops.spec import Spec

jax.config.update("jax_numpy_rank_promotion", "raise")
# Silenced at import, which pytest undoes before each test.
pytestmark = pytest.mark.filterwarnings("ignore:.*Triton.*deprecated:DeprecationWarning")

FORWARD, GRADIENT, BF16 = 2e-5, 2e-4, 1e-2
NAMES = ("identity", "silu", "ln_silu", "l2_silu")
# JAX's own products of fp32 operands are TF32 on GPUs by default, and so are the kernels'.
EXACT = {"precision": "highest"}


def _kernels_run():
  """Runs the kernels as they are where there is a GPU, interpreted where there is none."""
  on_gpu = jax.default_backend() == "gpu"
  return contextlib.nullcontext() if on_gpu else triton_gpu.interpreted()


def _distances(knobs, with_state=False, segment_ids=None, dtype=np.float32, **sizes):
  """Returns how far the kernels are from the definition in float64.

  That of the outputs and the state, then those of the gradients.
  """
  knobs = tuple(sorted((EXACT | knobs).items()))
  results = []
  for implementation, wide in (("triton_gpu", False), ("reference", True)):
    with jax.enable_x64(wide), _kernels_run():
      arrays, memory = op_cases.inputs(dtype=np.float32, **sizes)
      state = op_cases.state(arrays, dict(knobs)["chunk_size"]) if with_state else None
      arrays = (*(x.astype(dtype) for x in arrays[:4]), *arrays[4:])
      if wide:
        up = lambda x: x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
        arrays, memory, state = jax.tree.map(up, (arrays, memory, state))
      out = op_cases.value_and_grads(arrays, memory, state, segment_ids, implementation, knobs)
      results.append(jax.device_get(out))
  (got, grads), (want, want_grads) = results
  gradients = [op_cases.distance(x, y) for x, y in zip(grads, want_grads, strict=True)]
  return [op_cases.distance(got, want), *gradients]


def _check(knobs, **kw):
  """Compares the kernels with fp32 operands with the definition in float64."""
  forward, *gradients = _distances(knobs, **kw)
  assert forward <= FORWARD
  assert max(gradients) <= GRADIENT


def _packed(t):
  """Segment ids [2, t]: restarts inside chunks and blocks, padding in front, between and behind."""
  rows = ([1] * 5 + [0] * 3 + [2] * 64 + [3] * 14, [0] * 4 + [7] * 73 + [8] * 17 + [9] * 9)
  return jnp.asarray([r + [0] * (t - len(r)) for r in rows], jnp.int32)


SMALL = dict(h=2, d=64, v=128, m=32)


def test_one_document_of_an_odd_length():
  _check(dict(chunk_size=64), t=101, **SMALL)


@pytest.mark.parametrize("chunk_size", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_segments_and_a_state_entered_midway(chunk_size):
  knobs = dict(chunk_size=chunk_size, outer_gradient=0.5, phi="l2_silu", f="silu")
  _check(knobs, with_state=True, segment_ids=_packed(113), t=113, **SMALL)


SLOW_CHUNKS = [pytest.param(n, marks=pytest.mark.slow) for n in (16, 64)]


@pytest.mark.parametrize("chunk_size", [32, *SLOW_CHUNKS])
def test_segments_at_the_widest_where_registers_are_shortest(chunk_size):
  knobs = dict(chunk_size=chunk_size, outer_gradient=0.5)
  _check(knobs, with_state=True, segment_ids=_packed(113), t=113, h=1, d=128, v=128, m=128)


@pytest.mark.parametrize("phi_out", ["identity", "l2_silu"])
def test_widths_between_those_of_the_kernels_are_filled_up(phi_out):
  knobs = dict(chunk_size=16, curvature=1.0, phi_out=phi_out)
  _check(knobs, with_state=True, segment_ids=_packed(113), t=113, h=2, d=48, v=96, m=32)


def test_linearised_chunks_of_one_document():
  _check(dict(chunk_size=64, curvature=1.0), t=101, **SMALL)


@pytest.mark.parametrize(
  "chunk_size, rho",
  [(16, 0.5), *[pytest.param(c, r, marks=pytest.mark.slow) for c, r in ((32, 0.0), (64, 1.0))]],
)
def test_linearised_chunks_of_segments_from_a_state(chunk_size, rho):
  knobs = dict(chunk_size=chunk_size, curvature=0.7, outer_gradient=rho, phi="l2_silu", f="silu")
  _check(knobs, with_state=True, segment_ids=_packed(113), t=113, **SMALL)


@pytest.mark.slow
def test_linearised_chunks_that_programs_take_in_parts():
  knobs = dict(chunk_size=64, curvature=1.0)
  _check(knobs, segment_ids=_packed(113), t=113, h=1, d=128, v=128, m=128)


@pytest.mark.slow
@pytest.mark.parametrize("m", [32, 64, 128])
@pytest.mark.parametrize("d, v", [(64, 64), (64, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_every_shape(chunk_size, d, v, m):
  _check(dict(chunk_size=chunk_size), t=130, h=1, d=d, v=v, m=m)


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("phi", NAMES)
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_every_activation_with_segments_and_a_state(chunk_size, phi, rho):
  at = NAMES.index(phi)
  knobs = dict(phi=phi, f=NAMES[(at + 1) % 4], phi_out=NAMES[(at + 2) % 4], eps=1e-3)
  knobs |= dict(chunk_size=chunk_size, outer_gradient=rho)
  _check(knobs, with_state=True, segment_ids=_packed(113), t=113, **SMALL)


@pytest.mark.parametrize("curvature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_bf16_operands(curvature):
  knobs = dict(chunk_size=64, curvature=curvature)
  assert max(_distances(knobs, dtype=jnp.bfloat16, t=128, **SMALL)) <= BF16


@pytest.mark.slow
def test_bf16_operands_in_chunks_of_16():
  # A token whose read nearly cancels can hold most of an array's error: one of seed 0's 512 has 72%
  # of that of q's gradient, which alone is 1.06e-2. So each array's median over inputs counts.
  of = lambda seed: _distances(dict(chunk_size=16), dtype=jnp.bfloat16, t=128, seed=seed, **SMALL)
  assert max(np.median([of(seed) for seed in range(5)], axis=0)) <= BF16


@pytest.mark.parametrize("at", [7, pytest.param(64, marks=pytest.mark.slow)])
def test_a_split_gives_the_outputs_the_state_and_the_gradients_of_one_pass(at):
  arrays, memory = op_cases.inputs(t=100, dtype=np.float32, b=1, **SMALL)
  run = functools.partial(trellis, implementation="triton_gpu", chunk_size=32, **EXACT)

  def whole(arrays):
    o, state = run(*arrays, initial_memory=memory)
    return op_cases.scalar(o, state), (o, state)

  def parts(arrays):
    first, rest = (jax.tree.map(lambda x: x[:, s], arrays) for s in (slice(at), slice(at, None)))
    o, state = run(*first, initial_memory=memory)
    more, state = run(*rest, initial_state=state)
    o = jnp.concatenate([o, more], axis=1)
    return op_cases.scalar(o, state), (o, state)

  with _kernels_run():
    (_, want), want_grads = jax.jit(jax.value_and_grad(whole, has_aux=True))(arrays)
    (_, got), grads = jax.jit(jax.value_and_grad(parts, has_aux=True))(arrays)
  assert op_cases.distance(got, want) <= FORWARD
  assert op_cases.distance(grads, want_grads) <= GRADIENT


@pytest.mark.parametrize("curvature", [0.0, 1.0])
def test_single_tokens_go_through_chunks_padding_and_restarts(curvature):
  arrays, memory = op_cases.inputs(t=40, dtype=np.float32, **SMALL)
  ids = jnp.asarray([[1] * 9 + [0] * 2 + [2] * 29, [3] * 35 + [4] * 5], jnp.int32)
  run = lambda name: op_cases.single_tokens(
    name, arrays, memory, ids, phi="l2_silu", phi_out="silu", curvature=curvature, **EXACT
  )
  with _kernels_run():
    got, grads = run("triton_gpu")
  want, want_grads = run("reference")
  assert op_cases.distance(got, want) <= FORWARD
  assert op_cases.distance(grads, want_grads) <= GRADIENT


def test_erasing_gates_and_tiny_decays():
  arrays, memory = op_cases.inputs(t=70, b=1, dtype=np.float32, **SMALL)
  gates = np.array(arrays[4])
  gates[:, ::7], gates[:, 3::5] = -np.inf, np.log(1e-6)
  arrays = (*arrays[:4], jnp.asarray(gates), arrays[5])
  knobs = (("chunk_size", 16), *EXACT.items())
  want = op_cases.value_and_grads(arrays, memory, None, None, "reference", knobs)
  with _kernels_run():
    got = op_cases.value_and_grads(arrays, memory, None, None, "triton_gpu", knobs)
  assert op_cases.distance(got[0], want[0]) <= FORWARD
  assert op_cases.distance(got[1], want[1]) <= GRADIENT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_equal_the_op_s(name, dtype):
  rng = np.random.default_rng(0)
  z, a, ct = (jnp.asarray(rng.normal(size=(16, 64)), jnp.float32) for _ in range(3))
  with triton_gpu.interpreted():
    plan = Plan.of(Spec().check(), dtype, False)
  eps = 1e-2
  got = (
    _triton_activations.apply(plan, name, z, eps),
    _triton_activations.vjp(plan, name, z, ct, eps),
    _triton_activations.inner_gradient(plan, name, z, a, eps),
    *_triton_activations.inner_gradient_vjp(plan, name, z, a, ct, eps),
  )
  u = activations.inner_gradient(name, z, a, eps)
  want = (
    activations.apply(name, z, eps),
    activations.vjp(name, z, ct, eps),
    u,
    u,
    *activations.inner_gradient_vjp(name, z, a, ct, eps),
  )
  assert op_cases.distance(got, want) <= 5e-6


@pytest.mark.parametrize("with_runs", [False, True])
def test_decays_equal_the_op_s(with_runs):
  rng = np.random.default_rng(0)
  log_beta = np.float32(-50 * rng.random((2, 3, 128)) ** 8)
  log_beta[:, 1, 5::11] = -np.inf
  run, entry, runs = None, jnp.zeros((2,), jnp.int32), None
  if with_runs:
    run = jnp.asarray(np.cumsum(rng.random((2, 128)) < 0.03, axis=1), jnp.int32)
  got = _triton_decays.of(jnp.asarray(log_beta), run, 64)
  for i in range(2):
    part = jnp.asarray(log_beta[:, :, 64 * i : 64 * (i + 1)])
    if with_runs:
      entry = run[:, 63] if i else entry
      runs = decay.Runs.of(run[:, 64 * i : 64 * (i + 1)], entry)
    carry, pair = decay.within(part, runs)
    end, total = decay.to_end(part, runs)
    np.testing.assert_allclose(got.carry[:, :, i], carry, rtol=2e-5, atol=1e-30)
    np.testing.assert_allclose(got.end()[:, :, i], end, rtol=2e-5, atol=1e-30)
    np.testing.assert_allclose(got.carry[:, :, i, -1], total, rtol=2e-5, atol=1e-30)
    first = jnp.argmax(pair > 0, axis=-1)
    # What a token sees begins where the decay is not zero, but for decays too small for a float.
    assert np.all(np.asarray(got.first[:, :, i] <= first))
    if with_runs:
      np.testing.assert_array_equal(got.entered[:, 0, i], runs.entered)


def _lower(f, *args, mesh=None):
  with jax.sharding.use_abstract_mesh(mesh or kernel_gpu.mesh()):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def _shapes(dtype, b=2, t=192, h=2, d=64, v=64, m=64):
  array = jax.ShapeDtypeStruct
  tokens = [array((b, t, h, width), dtype) for width in (d, d, v, m)]
  return (*tokens, *[array((b, t, h), jnp.float32)] * 2)


def _loss(x, segment_ids=None, **knobs):
  o, _ = trellis(*x, segment_ids=segment_ids, implementation="triton_gpu", **knobs)
  return jnp.sum(o.astype(jnp.float32) ** 2)


def _launches(text):
  return re.findall(r'name = "(trellis_\w+)"', text)


FORWARD_KERNELS = ["trellis_evolve", "trellis_read"]
BACKWARD_KERNELS = [
  "trellis_read_values_backward",
  "trellis_read_keys_backward",
  "trellis_evolve_backward",
  "trellis_writes_backward",
]
# Of linearised chunks, in any order.
LINEARISED_FORWARD = sorted(["trellis_solvers", *FORWARD_KERNELS])
LINEARISED = sorted(
  [*LINEARISED_FORWARD, *BACKWARD_KERNELS, "trellis_follow_backward", "trellis_solvers_backward"]
)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lowers_for_cuda_to_two_launches_and_four_more_for_the_gradient(dtype):
  loss = functools.partial(_loss, chunk_size=16)
  assert _launches(_lower(loss, _shapes(dtype))) == FORWARD_KERNELS
  text = _lower(jax.grad(loss), _shapes(dtype))
  assert _launches(text) == FORWARD_KERNELS + BACKWARD_KERNELS


def test_linearised_chunks_have_one_launch_more_and_two_more_for_the_gradient():
  loss = functools.partial(_loss, chunk_size=64, curvature=1.0)
  assert sorted(_launches(_lower(loss, _shapes(jnp.bfloat16)))) == LINEARISED_FORWARD
  assert sorted(_launches(_lower(jax.grad(loss), _shapes(jnp.bfloat16)))) == LINEARISED


def test_a_single_token_is_one_launch():
  loss = functools.partial(_loss, chunk_size=16)
  assert _launches(_lower(loss, _shapes(jnp.bfloat16, t=1))) == ["trellis_step"]


def test_remat_runs_the_forward_kernels_again():
  loss = functools.partial(_loss, chunk_size=64)
  for forwards, f in ((1, loss), (2, jax.checkpoint(loss))):
    names = _launches(_lower(jax.value_and_grad(f), _shapes(jnp.bfloat16)))
    assert [names.count(name) for name in FORWARD_KERNELS] == [forwards] * 2
    assert [names.count(name) for name in BACKWARD_KERNELS] == [1] * 4


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_training_step_over_eight_gpus_runs_the_kernels_on_each_one_s_rows_and_heads(kind):
  mesh = kernel_gpu.mesh(("data", 4), ("model", 2), kind=kind)
  step, params, x = mixer_step.step_and_arguments(mesh, tokens=128)
  text = _lower(step, params, x, mesh=mesh)
  assert sorted(_launches(text)) == LINEARISED
  # g U of both passes: 2 of 8 rows, 2 of 4 heads.
  assert "tensor<2x2x2x128x64xf32>" in text and "tensor<2x8x" not in text


def test_supports_says_every_reason():
  if jax.default_backend() == "gpu":
    pytest.skip("one of the reasons is the platform, which is a GPU here")
  shapes = backends.Shapes(B=1, T=8, H=1, D=136, V=64, M=16, dtype="float16")
  reason = triton_gpu.supports(Spec(phi="softmax", chunk_size=8).check(), shapes)
  for part in ("platform is cpu", "D is 136", "M is 16", "chunk_size is 8", "float16", "phi is"):
    assert part in reason
  assert "V is" not in reason
  arrays, _ = op_cases.inputs(d=64, v=64, m=64, dtype=np.float32)
  with pytest.raises(ValueError, match=r"triton_gpu.*platform is cpu"):
    trellis(*arrays, implementation="triton_gpu")


def test_a_vmap_over_replicas_is_each_replica_alone():
  """Replicas train under one (experiments/replicas.py): a kernel's grid takes them in."""
  cases = [op_cases.inputs(t=40, dtype=np.float32, seed=seed, **SMALL) for seed in (0, 1)]
  knobs = tuple(sorted((EXACT | dict(chunk_size=16, curvature=1.0)).items()))
  run = lambda arrays, memory: op_cases.value_and_grads(
    arrays, memory, None, None, "triton_gpu", knobs
  )
  with _kernels_run():
    want = [run(*case) for case in cases]
    got = jax.vmap(run)(*jax.tree.map(lambda *x: jnp.stack(x), *cases))
  for i, alone in enumerate(want):
    assert op_cases.distance(jax.tree.map(lambda x, i=i: x[i], got), alone) <= 1e-6


@pytest.mark.parametrize("kind", ["affine", "trellis"])
def test_loops_take_more_tokens_at_a_time_where_a_step_is_launches(kind):
  x = jax.ShapeDtypeStruct((1, 8192, 1, 4), jnp.float32)
  gates = jax.ShapeDtypeStruct((1, 8192, 1), jnp.float32)
  loops = {}
  for where in ("here", "gpu"):
    mesh = contextlib.nullcontext()
    if where == "gpu":
      mesh = jax.sharding.use_abstract_mesh(kernel_gpu.mesh(kind=AxisType.Auto))
    with mesh:
      if kind == "affine":
        program = jax.make_jaxpr(functools.partial(affine, chunk_size=64))(x, x, x)
      else:
        run = functools.partial(trellis, chunk_size=64, implementation="xla")
        program = jax.make_jaxpr(run)(x, x, x, x, gates, gates)
    loops[where] = sorted(map(int, re.findall(r"length=(\d+)", str(program))))
  blocks = {"cpu": [2, 64], "gpu": [4, 32]}  # of 128 and 2048 tokens, and their chunks
  assert loops == {"here": blocks[jax.default_backend()], "gpu": blocks["gpu"]}

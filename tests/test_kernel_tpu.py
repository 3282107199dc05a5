"""The TPU kernels in Pallas' interpreters against the op's definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
import tpu_kernels

from pallas_kernels import _tpu_forward, mosaic_tpu
from trellis_jax import trellis
from trellis_jax.ops import backends
from trellis_jax.ops.spec import Spec

jax.config.update("jax_numpy_rank_promotion", "raise")

ACTIVATIONS = ("ln_silu", "l2_silu", "silu", "identity")


def _check(how, arrays, memory, state, segment_ids, knobs):
  with tpu_kernels.interpreted(how):
    got = tpu_kernels.value_and_grads("mosaic_tpu", arrays, memory, state, segment_ids, **knobs)
  want = tpu_kernels.value_and_grads("reference", arrays, memory, state, segment_ids, **knobs)
  assert op_cases.distance(got[0], want[0]) <= tpu_kernels.FORWARD
  for x, y in zip(got[1], want[1], strict=True):
    assert op_cases.distance(x, y) <= tpu_kernels.GRADIENT


def test_segments_from_a_state_with_nan_in_memory_and_races_reported():
  arrays, memory = tpu_kernels.case(t=101)
  knobs = dict(chunk_size=64, eps=1e-3)
  ids = tpu_kernels.segments(101)
  _check(tpu_kernels.STRICT, arrays, memory, op_cases.state(arrays, 64), ids, knobs)


def test_linearised_chunks_of_segments_from_a_state():
  arrays, memory = tpu_kernels.case(t=101)
  knobs = dict(chunk_size=64, eps=1e-3, curvature=1.0)
  ids = tpu_kernels.segments(101)
  _check(tpu_kernels.STRICT, arrays, memory, op_cases.state(arrays, 64), ids, knobs)


@pytest.mark.parametrize("rho", [0.5, pytest.param(0.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("chunk_size", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_linearised_chunks_of_other_sizes_and_a_tempered_outer_gradient(chunk_size, rho):
  arrays, memory = tpu_kernels.case(b=1, t=70, h=3, d=128, v=64, m=32)
  knobs = dict(phi="l2_silu", chunk_size=chunk_size, outer_gradient=rho, curvature=0.7)
  _check(True, arrays, memory, None, None, knobs)


def test_other_activations_widths_and_a_tempered_outer_gradient():
  arrays, memory = tpu_kernels.case(b=1, t=40, h=3, d=128, v=64, m=32)
  knobs = dict(phi="l2_silu", f="silu", phi_out="identity", chunk_size=32, outer_gradient=0.5)
  _check(True, arrays, memory, None, None, knobs)


def test_widths_between_those_of_the_kernels_are_filled_up():
  arrays, memory = tpu_kernels.case(t=70, d=48, v=96, m=32)
  knobs = dict(phi_out="l2_silu", chunk_size=32, curvature=1.0)
  state = op_cases.state(arrays, 32)
  _check(tpu_kernels.STRICT, arrays, memory, state, tpu_kernels.segments(70), knobs)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("m", [32, 64, 128])
@pytest.mark.parametrize("d,v", [*itertools.product((64, 128), repeat=2)])
def test_every_shape(d, v, m, chunk_size):
  arrays, memory = tpu_kernels.case(t=87, h=5, d=d, v=v, m=m)
  knobs = dict(chunk_size=chunk_size, eps=1e-3)
  segment_ids = tpu_kernels.segments(87) if d == v else None
  _check(tpu_kernels.STRICT, arrays, memory, None, segment_ids, knobs)


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("phi", ACTIVATIONS)
def test_every_activation_and_outer_gradient(phi, rho):
  at = ACTIVATIONS.index(phi)
  f, phi_out = (ACTIVATIONS[(at + i) % 4] for i in (1, 2))
  arrays, memory = tpu_kernels.case(t=70, h=2)
  knobs = dict(phi=phi, f=f, phi_out=phi_out, eps=1e-3, chunk_size=32, outer_gradient=rho)
  state = op_cases.state(arrays, 32)
  _check(True, arrays, memory, state, tpu_kernels.segments(70), knobs)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size, curvature", [(16, 0.0), (64, 0.0), (16, 1.0), (64, 1.0)])
def test_bf16_operands(chunk_size, curvature):
  arrays, memory = tpu_kernels.case(b=4, t=150)  # two rows a program
  low = (*(x.astype(jnp.bfloat16) for x in arrays[:4]), *arrays[4:])
  exact = tuple(x.astype(jnp.float32) for x in low)
  knobs = dict(chunk_size=chunk_size, curvature=curvature)
  with tpu_kernels.interpreted():
    got = tpu_kernels.value_and_grads("mosaic_tpu", low, memory, **knobs)
  want = tpu_kernels.value_and_grads("reference", exact, memory, **knobs)
  assert got[0][0].dtype == jnp.bfloat16 and got[0][1].memory_k.dtype == np.float32
  assert op_cases.distance(got[0], want[0]) <= tpu_kernels.BF16
  for x, y in zip(got[1], want[1], strict=True):
    assert op_cases.distance(x, y) <= tpu_kernels.BF16


@pytest.mark.slow
@pytest.mark.parametrize("curvature", [0.0, 1.0])
@pytest.mark.parametrize("split", [5, 32, 41])
def test_any_split_is_exact(split, curvature):
  arrays, memory = tpu_kernels.case(t=70)
  run = lambda x, **kw: trellis(
    *x,
    initial_memory=memory,
    chunk_size=32,
    curvature=curvature,
    implementation="mosaic_tpu",
    **kw,
  )
  part = lambda at: tuple(x[:, at] for x in arrays)
  with tpu_kernels.interpreted():
    whole, want = run(arrays)
    first, state = run(part(slice(split)))
    rest, got = run(part(slice(split, None)), initial_state=state)
  assert op_cases.distance(jnp.concatenate([first, rest], axis=1), whole) <= 1e-6
  assert op_cases.distance(got, want) <= 1e-6


@pytest.mark.parametrize(
  "h, curvature", [(3, 0.0), (3, 1.0), pytest.param(16, 0.0, marks=pytest.mark.slow)]
)
def test_single_tokens_go_through_chunks_padding_and_restarts(h, curvature):
  arrays, memory = tpu_kernels.case(t=40, h=h, d=64, v=128, m=32)
  ids = jnp.asarray([[1] * 9 + [0] * 2 + [2] * 29, [3] * 35 + [4] * 5], jnp.int32)
  run = lambda name: op_cases.single_tokens(
    name, arrays, memory, ids, phi="l2_silu", phi_out="silu", curvature=curvature
  )
  with tpu_kernels.interpreted():
    got, grads = run("mosaic_tpu")
  want, want_grads = run("reference")
  assert op_cases.distance(got, want) <= tpu_kernels.FORWARD
  assert op_cases.distance(grads, want_grads) <= tpu_kernels.GRADIENT


@pytest.mark.slow
@pytest.mark.parametrize("phi", ACTIVATIONS)
def test_a_single_token_in_memory_that_starts_as_nan(phi):
  f, phi_out = (ACTIVATIONS[(ACTIVATIONS.index(phi) + i) % 4] for i in (1, 2))
  arrays, memory = tpu_kernels.case(t=1, h=2, m=128)
  knobs = dict(phi=phi, f=f, phi_out=phi_out, chunk_size=64)
  state = op_cases.state(arrays, 64)
  _check(tpu_kernels.STRICT, arrays, memory, state, jnp.asarray([[1], [8]], jnp.int32), knobs)


@pytest.mark.slow
def test_erasing_gates_and_tiny_decays():
  arrays, memory = tpu_kernels.case(t=64)
  gates = np.array(arrays[4])
  gates[:, ::7], gates[:, 3::5] = -np.inf, np.log(1e-6)
  arrays = (*arrays[:4], jnp.asarray(gates), arrays[5])
  _check(True, arrays, memory, None, None, dict(chunk_size=32))


def test_the_backward_computes_the_forward_again_only_under_remat():
  arrays, memory = tpu_kernels.case(b=1, t=64)

  def loss(remat):
    f = lambda x: jnp.sum(
      trellis(*x, initial_memory=memory, chunk_size=64, implementation="mosaic_tpu")[0]
    )
    return jax.grad(jax.checkpoint(f) if remat else f)

  with tpu_kernels.interpreted():
    count = lambda remat: str(jax.make_jaxpr(loss(remat))(arrays)).count(
      f"name={_tpu_forward.NAME}"
    )
    assert (count(False), count(True)) == (1, 2)


def test_every_reason_is_listed_and_a_name_never_falls_back():
  spec = Spec(phi="softmax", chunk_size=5).check()
  shapes = backends.Shapes(1, 10, 2, 136, 64, 65, "float16")
  reasons = mosaic_tpu.supports(spec, shapes)
  for part in (
    "platform is cpu",
    "D is 136, more than 128",
    "M is 65",
    "chunk_size is 5",
    "float16",
    "phi is softmax",
  ):
    assert part in reasons
  assert "V is" not in reasons
  between = backends.Shapes(1, 10, 2, 48, 96, 64, "float32")
  assert "V is 96 and phi_out ln_silu, whose mean is over V" in mosaic_tpu.supports(spec, between)
  assert "V is" not in mosaic_tpu.supports(spec._replace(phi_out="identity"), between)
  arrays, _ = tpu_kernels.case(b=1, t=10)
  with pytest.raises(ValueError, match="platform is cpu, not one of tpu"):
    trellis(*arrays, chunk_size=64, implementation="mosaic_tpu")

"""Bad input to the op: one sentence with the given value and the accepted one."""

import jax.numpy as jnp
import numpy as np
import op_cases
import pytest

from trellis_jax import TrellisState, trellis

ARRAYS, MEMORY = op_cases.inputs(t=6, dtype=np.float32)
NAMES = ("q", "k", "v", "alpha", "log_beta", "gamma")


def _call(**change):
  arguments = dict(zip(NAMES, ARRAYS)) | change
  arrays = [arguments.pop(name) for name in NAMES]
  return trellis(*arrays, **arguments)


def _fresh(chunk_size):
  return TrellisState.fresh(MEMORY, 2, chunk_size)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(q=ARRAYS[0][0]), r"q has shape \(6, 3, 5\); accepted is \[B, T, H, D\]"),
    (dict(k=ARRAYS[2]), r"k has shape \(2, 6, 3, 7\); with q \(2, 6, 3, 5\) it must be"),
    (dict(v=ARRAYS[2][:1]), r"v has shape \(1, 6, 3, 7\); .* must be \(2, 6, 3, 7\)"),
    (dict(alpha=ARRAYS[4]), r"alpha has shape \(2, 6, 3\); accepted is \[B, T, H, M\]"),
    (dict(gamma=ARRAYS[0]), r"gamma has shape .* must be \(2, 6, 3\)"),
    (dict(k=jnp.ones((2, 6, 3, 5), jnp.int32)), "k has dtype int32; accepted are floating"),
    (dict(phi="relu"), "phi='relu' is unknown; accepted are identity, silu, ln_silu"),
    (dict(f="gelu"), "f='gelu' is unknown"),
    (dict(phi_eps=0.0), "phi_eps=0.0 is not accepted; it must be finite and > 0"),
    (dict(chunk_size=0), "chunk_size=0 is not accepted; it must be >= 1"),
    (dict(chunk_size=2.5), "chunk_size=2.5 is not accepted; it must be an integer"),
    (dict(curvature=-1.0), "curvature=-1.0 is not accepted; it must be finite and >= 0"),
    (dict(outer_gradient=1.5), r"outer_gradient=1.5 is not accepted; it lies in \[0, 1\]"),
    (dict(implementation="cuda"), "implementation='cuda' is unknown; accepted are None, reference"),
    (dict(log_beta=ARRAYS[4] + 1), r"log_beta has the value 0\.\d+; accepted are log decays <= 0"),
    (dict(log_beta=ARRAYS[4] * jnp.nan), "log_beta has the value nan"),
    (dict(gamma=ARRAYS[5] / 0), "gamma has the value inf; accepted are finite"),
    (dict(segment_ids=jnp.ones((2, 5), jnp.int32)), r"segment_ids has shape \(2, 5\)"),
    (dict(segment_ids=jnp.ones((2, 6))), "segment_ids has dtype float32; accepted are integer"),
    (dict(initial_memory=MEMORY[0]), "initial_memory is a .*; accepted is a pair"),
    (dict(initial_memory=MEMORY[::-1]), r"S_k of initial_memory has shape \(3, 6, 7\)"),
    (dict(initial_state=MEMORY), "initial_state is a tuple; accepted is a TrellisState"),
    (dict(initial_state=_fresh(1)), "chunk_size=16 cannot go on from .* chunk_size = 1"),
    (dict(initial_state=_fresh(4), chunk_size=1), "chunk_size=1 cannot go on from .* > 1"),
  ],
)
def test_bad_input_is_one_sentence(change, message):
  with pytest.raises(ValueError, match=message) as error:
    _call(**change)
  assert "\n" not in str(error.value)


def test_no_tokens_are_refused():
  empty = [x[:, :0] for x in ARRAYS]
  with pytest.raises(ValueError, match=r"B, T, H, D, V, M are \(2, 0, 3, 5, 7, 6\); each must be"):
    trellis(*empty)


def test_erasing_and_keeping_gates_are_accepted():
  gates = ARRAYS[4].at[:, 0].set(-jnp.inf).at[:, 1].set(0)
  assert np.all(np.isfinite(np.asarray(_call(log_beta=gates)[0])))

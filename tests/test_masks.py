"""Which masks of `nnx.MultiHeadAttention` are padding, and what the others are told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trellis_jax.masks import live_tokens

jax.config.update("jax_numpy_rank_promotion", "raise")

B, T, H = 2, 5, 3
LIVE = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]], bool)
CAUSAL = np.tri(T, dtype=bool)
BOTH = nnx.combine_masks(
  nnx.make_causal_mask(jnp.zeros((B, T))), nnx.make_attention_mask(jnp.array(LIVE), jnp.array(LIVE))
)


@pytest.mark.parametrize(
  "mask",
  [
    LIVE,
    LIVE.astype(np.int32),
    LIVE[:, None, None],
    np.broadcast_to(LIVE[:, None, None], (B, H, 1, T)),
    CAUSAL & LIVE[:, None, None],
    np.broadcast_to(CAUSAL & LIVE[:, None, None], (B, H, T, T)),
    BOTH,
  ],
  ids=["rows", "int", "keys", "keys of heads", "causal & keys", "of heads", "flax's own"],
)
def test_padding_masks_are_read(mask):
  np.testing.assert_array_equal(live_tokens(jnp.asarray(mask), (B, T), H), LIVE)


def test_causal_masks_hide_no_token():
  for mask in (CAUSAL, CAUSAL[None, None], nnx.make_causal_mask(jnp.zeros((B, T)))):
    np.testing.assert_array_equal(live_tokens(jnp.asarray(mask), (B, T), H), np.ones((B, T)))


def test_any_number_of_batch_axes():
  live = np.stack([LIVE, LIVE[::-1], ~LIVE])
  for mask in (live, live[:, :, None, None], CAUSAL & live[:, :, None, None]):
    np.testing.assert_array_equal(live_tokens(mask, (3, B, T), H), live)
  np.testing.assert_array_equal(live_tokens(LIVE[0], (T,), H), LIVE[0])


def test_traced_padding_masks_are_read():
  read = jax.jit(live_tokens, static_argnums=(1, 2))
  for mask in (LIVE, LIVE[:, None, None], LIVE[:, None, None].astype(np.float32)):
    np.testing.assert_array_equal(read(mask, (B, T), H), LIVE)


def _without(mask, query, key):
  mask = np.array(mask)
  mask[..., query, key] = False
  return mask


REFUSED = {
  "future": (np.ones((B, 1, T, T), bool), r"lets token 0 see the later token 1; .*segment_ids"),
  "padding alone": (LIVE[:, None, None] & LIVE[:, None, :, None], r"later token 1"),
  "window": (
    _without(CAUSAL[None, None], 4, 0),
    r"hides token 0 from token 4 and shows it to itself",
  ),
  "strictly causal": (
    np.tri(T, k=-1, dtype=bool),
    r"shows token 0 to token 1 and hides it from itself",
  ),
  "heads": (np.stack([CAUSAL, CAUSAL, CAUSAL.T]), r"differs between heads"),
  "shape": (LIVE[:, None], r"shape \(2, 1, 5\); accepted are \(2, 5\) and \(2, 1, 1, 5\)"),
  "length": (np.ones((B, 1, 1, T + 1), bool), r"shape \(2, 1, 1, 6\)"),
  "additive": (np.where(LIVE, 0.0, -1e9), r"value -1000000000.0; accepted are True or 1"),
}


@pytest.mark.parametrize("mask, message", REFUSED.values(), ids=REFUSED)
def test_other_masks_are_refused(mask, message):
  with pytest.raises(ValueError, match=message):
    live_tokens(jnp.asarray(mask), (B, T), H)


def test_traced_scores_are_refused():
  with pytest.raises(ValueError, match=r"shape \(2, 1, 5, 5\) and is traced.*pass the padding"):
    jax.jit(live_tokens, static_argnums=(1, 2))(BOTH, (B, T), H)


def test_a_shape_that_reads_both_ways_is_refused():
  with pytest.raises(ValueError, match=r"shape \(5, 5\).*mask\[..., None, None, :\]"):
    live_tokens(CAUSAL, (T, T), H)
  np.testing.assert_array_equal(live_tokens(np.ones((1, 1)), (1, 1), H), [[True]])

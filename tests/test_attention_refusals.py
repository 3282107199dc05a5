"""What TrellisAttention refuses: the reason and the fix in one sentence."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from trellis_jax import TrellisAttention
from trellis_jax.mixers.trellis import State

jax.config.update("jax_numpy_rank_promotion", "raise")

B, T, H, F = 2, 7, 2, 8
SMALL = dict(num_heads=H, in_features=F, num_slots=4, chunk_size=4)
X = jax.random.normal(jax.random.key(7), (B, T, F))
TOKEN = X[:, :1]  # One token compiles in a fraction of the time of several.


def build(**kw):
  return TrellisAttention(**(SMALL | kw), rngs=nnx.Rngs(0))


REFUSED = {
  "num_heads": (dict(num_heads=0), "num_heads=0 is not accepted; it must be an integer >= 1"),
  "in_features": (dict(in_features=(8,)), r"in_features=\(8,\) is not accepted"),
  "out_features": (dict(out_features=-1), "out_features=-1 is not accepted"),
  "divide": (dict(qkv_features=9), "qkv_features=9 is not accepted; .* multiple of 2 heads"),
  "in divides": (dict(in_features=9), "qkv_features=9 is not accepted; .* multiple of 2 heads"),
  "head_dim": (dict(qkv_features=8, head_dim=3), "qkv_features=8 and head_dim=3"),
  "num_kv_heads": (dict(num_kv_heads=1), "num_kv_heads=1 is not accepted, 2 is; every head"),
  "in_kv_features": (dict(in_kv_features=4), "in_kv_features=4 is not accepted, 8 is; keys"),
  "dropout": (dict(dropout_rate=1.0), r"dropout_rate=1.0 is not accepted; it lies in \[0, 1\)"),
  "attention_fn": (dict(attention_fn=nnx.dot_product_attention), "None is; the attention is"),
  "normalize_qk": (dict(normalize_qk=True), "normalize_qk=True is not accepted, False is; .*qk_n"),
  "ln_promote": (dict(ln_promote_dtype=abs), "ln_promote_dtype=.* None is; .*qk_norm"),
  "query_ln": (dict(query_ln_scale_metadata={"a": 1}), "query_ln_scale_metadata=.*qk_norm"),
  "key_ln": (dict(key_ln_scale_metadata={"a": 1}), "key_ln_scale_metadata=.*qk_norm"),
  "qkv_cls": (dict(qkv_dot_general_cls=dict), "pass the function as qkv_dot_general"),
  "out_cls": (dict(out_dot_general_cls=dict), "pass the function as out_dot_general"),
  "unknown": (dict(dropout=0.1), "no knob 'dropout'; accepted are num_slots"),
  "knob": (dict(phi="relu"), "phi='relu' is unknown; accepted are"),
}


@pytest.mark.parametrize("keywords, message", REFUSED.values(), ids=REFUSED)
def test_refused_keywords(keywords, message):
  with pytest.raises(ValueError, match=message):
    build(**keywords)


def test_values_that_say_the_same_are_taken():
  build(num_kv_heads=H, in_kv_features=F, normalize_qk=False, query_ln_scale_metadata={})


REFUSED_CALLS = {
  "cross": ((X, X + 1), {}, r"inputs_k of shape \(2, 7, 8\) is not .* call layer\(inputs_q\)"),
  "values": ((X, X, X + 1), {}, "inputs_v of shape .* is not the array inputs_q"),
  "values alone": ((X, None, X + 1), {}, "inputs_v of shape .* is not the array inputs_q"),
  "both ways": ((X,), dict(is_causal=False), "is_causal=False is not accepted, True is; .*second"),
  "mask": ((X,), dict(mask=jnp.ones((B, 1, T, T), bool)), "later token 1; .* segment_ids"),
  "features": ((X[..., :5],), {}, r"inputs_q has shape \(2, 7, 5\); accepted is \[\*batch, T, 8\]"),
  "rank": ((X[0, 0],), {}, r"inputs_q has shape \(8,\); accepted"),
  "no tokens": ((X[:, :0],), {}, r"inputs_q has shape \(2, 0, 8\); .* >= 1"),
  "segments": ((X,), dict(segment_ids=jnp.ones((B, 3), int)), r"\(2, 3\); it must be \(2, 7\)"),
  "no cache": ((X,), dict(decode=True), r"no cache yet; call init_cache\(inputs.shape\) first"),
  "state": ((X,), dict(initial_state=(1, 2)), "initial_state is a tuple; accepted is what return_"),
}


@pytest.mark.parametrize("args, keywords, message", REFUSED_CALLS.values(), ids=REFUSED_CALLS)
def test_refused_calls(args, keywords, message):
  with pytest.raises(ValueError, match=message):
    build()(*args, **keywords)


def test_states_that_do_not_fit_are_refused():
  layer = build()
  layer.init_cache((3, 1, F))
  with pytest.raises(ValueError, match=r"the cache has taps of shape \(3, 3, 8\); for 2 rows"):
    layer(X, decode=True)
  state = layer.init_state((B, 1, F))
  with pytest.raises(ValueError, match="initial_state is given with decode=True"):
    layer(X, initial_state=state, decode=True)
  with pytest.raises(ValueError, match=r"initial_state has taps of shape \(2, 3, 8\); for 2 rows"):
    build(qkv_features=4)(X, initial_state=state)
  for field in ("v", "alpha"):
    other = build(**{f"{field}_conv": False}).init_state((B, 1, F))
    with pytest.raises(ValueError, match=rf"initial_state has {field}_taps of shape None;"):
      build()(X, initial_state=other)
  with pytest.raises(ValueError, match=r"input_shape=\(2, 7, 5\) is not accepted"):
    layer.init_cache((B, T, 5))
  assert isinstance(state, State)

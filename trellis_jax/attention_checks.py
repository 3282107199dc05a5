"""What `TrellisAttention` takes of `nnx.MultiHeadAttention`'s interface, and what it refuses."""

from collections.abc import Mapping
from typing import Any

_NO_NORM = "the knob qk_norm makes q and k of length 1, so leave it out"
# What only softmax attention has: the keyword's one value, and what to do instead.
_FIXED = {
  "attention_fn": (None, "the attention is trellis_jax.trellis, so leave it out"),
  "normalize_qk": (False, _NO_NORM),
  "ln_promote_dtype": (None, _NO_NORM),
  "query_ln_scale_metadata": ({}, _NO_NORM),
  "key_ln_scale_metadata": ({}, _NO_NORM),
  "qkv_dot_general_cls": (None, "pass the function as qkv_dot_general"),
  "out_dot_general_cls": (None, "pass the function as out_dot_general"),
}


def check_keywords(given: Mapping[str, Any]) -> None:
  """Raises ValueError for sizes that do not fit and for what only softmax attention has."""
  for name in ("num_heads", "in_features", "qkv_features", "out_features"):
    value = given[name]
    optional = name in ("qkv_features", "out_features") and value is None
    if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
      raise ValueError(f"{name}={value!r} is not accepted; it must be an integer >= 1")
  heads, qkv, head_dim = given["num_heads"], given["qkv_features"], given["knobs"].get("head_dim")
  if qkv is not None and head_dim:
    raise ValueError(
      f"qkv_features={qkv} and head_dim={head_dim} set the same width; give one of them"
    )
  wide = given["in_features"] if qkv is None else qkv
  if not head_dim and wide % heads:
    raise ValueError(f"qkv_features={wide} is not accepted; it must be a multiple of {heads} heads")
  if not 0 <= given["dropout_rate"] < 1:
    raise ValueError(f"dropout_rate={given['dropout_rate']} is not accepted; it lies in [0, 1)")
  for name, same, why in (
    ("num_kv_heads", "num_heads", "every head writes its own memory"),
    ("in_kv_features", "in_features", "keys and values come from the inputs"),
  ):
    if given[name] not in (None, given[same]):
      raise ValueError(f"{name}={given[name]!r} is not accepted, {given[same]} is; {why}")
  for name, (accepted, fix) in _FIXED.items():
    if given[name] != accepted:
      raise ValueError(f"{name}={given[name]!r} is not accepted, {accepted!r} is; {fix}")


def check_call(inputs_q, inputs_k, inputs_v, is_causal, in_features) -> None:
  """Raises ValueError unless this is causal self-attention over inputs [*batch, T, features]."""
  for name, x in (("inputs_k", inputs_k), ("inputs_v", inputs_v)):
    if x is not None and x is not inputs_q:
      raise ValueError(
        f"{name} of shape {x.shape} is not the array inputs_q; Trellis compresses the sequence it "
        "reads, so call layer(inputs_q), and use nnx.MultiHeadAttention for cross-attention"
      )
  if not is_causal:
    raise ValueError(
      f"is_causal={is_causal} is not accepted, True is; the memory has seen the past alone, so "
      "add a second layer over the reversed inputs"
    )
  if inputs_q.ndim < 2 or 0 in inputs_q.shape or inputs_q.shape[-1] != in_features:
    raise ValueError(
      f"inputs_q has shape {inputs_q.shape}; accepted is [*batch, T, {in_features}] with every "
      "axis >= 1"
    )

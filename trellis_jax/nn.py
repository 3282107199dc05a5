"""Parts that the mixers and the model share."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from trellis_jax import products, sharding
from trellis_jax.typing import Array


def unit(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
  """Returns x / sqrt(sum x^2 + eps) over the last axis, computed in at least fp32."""
  y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (y * jax.lax.rsqrt(jnp.sum(y * y, -1, keepdims=True) + eps)).astype(x.dtype)


def linear(inputs: int, outputs: int, *, init_std: float | None = None, **kw) -> nnx.Linear:
  """Returns a map without bias, initialised N(0, init_std), or N(0, 1 / inputs) for None.

  `kw` are nnx.Linear's; a `kernel_init`, `use_bias` or `dot_general` there takes precedence, the
  last over `products.dot_general`.
  """
  init = nnx.initializers.normal(inputs**-0.5 if init_std is None else init_std)
  ours = {"use_bias": False, "kernel_init": init, "dot_general": products.dot_general}
  return nnx.Linear(inputs, outputs, **(ours | kw))


class ShortConv(nnx.Module):
  """Depthwise causal convolution over the last K inputs of the same segment (paper, Fig. 1).

  y_t = act(sum_{j < K} w_j x_{t-j}). The taps w_j start at decay^j, decay one number or one per
  feature, plus a number of each feature and tap that is uniform in [-spread, spread].
  """

  def __init__(
    self,
    width: int,
    taps: int,
    *,
    activation: str = "silu",
    decay: float | Float[Array, " W"] = 0.0,
    spread: float = 0.0,
    dtype,
    param_dtype,
    rngs: nnx.Rngs,
  ):
    decays = jnp.broadcast_to(jnp.asarray(decay, param_dtype), (width,))
    kernel = decays[None] ** jnp.arange(taps)[:, None]
    if spread:
      noise = rngs.params.uniform(kernel.shape, param_dtype, -spread, spread)
      kernel = kernel + noise
    self.kernel = nnx.Param(kernel)
    self.activation = activation
    self.dtype = dtype

  def __call__(
    self,
    x: Float[Array, "B T W"],
    before: Float[Array, "B K-1 W"],
    run: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T W"]:
    """Convolves x, which goes on from the inputs `before`; taps do not cross a change of `run`.

    Args:
      x: inputs.
      before: the last K - 1 inputs ahead of x, oldest first, zeros at the start of a sequence.
      run: number of restarts up to each token, 0 for the segment of `before`; None: no restarts.
    """
    kernel = self.kernel[...].astype(self.dtype)
    taps, length = kernel.shape[0], x.shape[1]
    inputs = jnp.concatenate([before.astype(self.dtype), x.astype(self.dtype)], axis=1)
    if run is not None:
      runs = jnp.pad(run, [(0, 0), (taps - 1, 0)])
    y = 0
    for j in range(taps):
      at = taps - 1 - j
      shifted = inputs[:, at : at + length]
      if run is not None and j:
        shifted = jnp.where((runs[:, at : at + length] == run)[..., None], shifted, 0)
      y = y + shifted * kernel[j][None, None]
    return getattr(jax.nn, self.activation)(y) if self.activation != "none" else y


def last_taps(x, before, run=None, count=None):
  """Returns what `ShortConv` needs to go on: the last K - 1 live inputs [B, K-1, W].

  Args:
    x: inputs [B, T, W].
    before: what came ahead of them [B, K-1, W].
    run: as in `ShortConv`; inputs of an earlier run become zeros.
    count: live inputs of each row [B], the rest being padding at the end; None: all.
  """
  taps = before.shape[1]
  inputs = jnp.concatenate([before, x.astype(before.dtype)], axis=1)
  if run is None:
    return inputs[:, x.shape[1] :]
  at = count[:, None] + jnp.arange(taps)[None]
  runs = jnp.pad(run, [(0, 0), (taps, 0)])
  same = jnp.take_along_axis(runs, at, axis=1) == run[:, -1:]
  return jnp.where(same[..., None], jnp.take_along_axis(inputs, at[..., None], axis=1), 0)


class SwiGLU(nnx.Module):
  """down(silu(gate x) * up x)."""

  def __init__(self, width: int, hidden: int, *, out_scale: float, init_std, rngs, **kw):
    self.gate = linear(width, hidden, init_std=init_std, rngs=rngs, **kw)
    self.up = linear(width, hidden, init_std=init_std, rngs=rngs, **kw)
    std = (hidden**-0.5 if init_std is None else init_std) * out_scale
    self.down = linear(hidden, width, init_std=std, rngs=rngs, **kw)

  def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
    """Returns the MLP's output, of x's width."""
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Output(nnx.Module):
  """From a recurrence's heads to the residual stream, as all mixers do it (paper, Fig. 1).

  y = W_o (norm(o) * act(W_g x)), or W_o norm(o * act(W_g x)) with `gate_first`.
  """

  def __init__(
    self,
    width: int,
    num_heads: int,
    value_dim: int,
    *,
    out_features: int | None = None,
    gate: str,
    post_norm: str,
    gate_first: bool = False,
    maps: Mapping[str, Any],
    out_map: Mapping[str, Any],
    rngs: nnx.Rngs,
    **kw,
  ):
    """Builds the parameters.

    Args:
      width: of x.
      num_heads: H.
      value_dim: V.
      out_features: width of y; None is `width`.
      gate: name of the activation in jax.nn, or "none".
      post_norm: RMSNorm over all heads ("rms"), each head ("head_rms"), or "none".
      gate_first: whether the gate comes before the norm.
      maps, out_map: keywords of `linear` for the gate's map and for W_o.
      rngs: of the initial values.
      **kw: dtype and param_dtype.
    """
    self.gate_name, self.post_norm, self.gate_first = gate, post_norm, gate_first
    values, out_features = num_heads * value_dim, out_features or width
    self.num_weights = values * (out_features + (gate != "none") * width)
    if gate != "none":
      self.gate = linear(width, values, **(dict(rngs=rngs) | kw | maps))
    if post_norm != "none":
      norm_width = value_dim if post_norm == "head_rms" else values
      self.norm = nnx.RMSNorm(norm_width, epsilon=1e-6, rngs=rngs, **kw)
    self.out = linear(values, out_features, **(dict(rngs=rngs) | kw | out_map))

  def __call__(
    self, o: Float[Array, "B T H V"], x: Float[Array, "B T W"]
  ) -> Float[Array, "B T out"]:
    """Returns y for a recurrence's outputs o and the mixer's inputs x."""
    gate = lambda o: o
    if self.gate_name != "none":
      gate = lambda o: o * getattr(jax.nn, self.gate_name)(self.gate(x)).reshape(o.shape)
    if self.gate_first:
      o = gate(o)
    if self.post_norm == "head_rms":
      o = self.norm(o)
    o = o.reshape(*o.shape[:2], -1)
    if self.post_norm == "rms":
      o = self.norm(o)
    if not self.gate_first:
      o = gate(o)
    return self.out(o, out_sharding=sharding.explicit(x))

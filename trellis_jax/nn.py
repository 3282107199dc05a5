"""Parts that the mixers and the model share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from trellis_jax.typing import Array


def unit(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
  """Returns x / sqrt(sum x^2 + eps) over the last axis, computed in at least fp32."""
  y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (y * jax.lax.rsqrt(jnp.sum(y * y, -1, keepdims=True) + eps)).astype(x.dtype)


def linear(inputs: int, outputs: int, *, init_std: float | None = None, **kw) -> nnx.Linear:
  """Returns a map without bias, initialised N(0, init_std), or N(0, 1 / inputs) for None.

  `kw` are nnx.Linear's; a `kernel_init` or `use_bias` there takes precedence.
  """
  init = nnx.initializers.normal(inputs**-0.5 if init_std is None else init_std)
  return nnx.Linear(inputs, outputs, **({"use_bias": False, "kernel_init": init} | kw))


class ShortConv(nnx.Module):
  """Depthwise causal convolution over the last K inputs of the same segment (paper, Fig. 1).

  y_t = act(sum_{j < K} w_j x_{t-j}), w_0 starting at 1 and the other taps at 0.
  """

  def __init__(self, width: int, taps: int, *, activation: str = "silu", dtype, param_dtype):
    kernel = jnp.zeros((taps, width), param_dtype).at[0].set(1)
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

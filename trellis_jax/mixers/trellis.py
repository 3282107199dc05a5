r"""The Trellis mixer (paper, section 3 and Fig. 1).

For an input x [B, T, width], per head:

  h      = W_qk x                            one map for queries and keys
  q, k   = unit(silu(conv_q h)), unit(silu(conv_k h))
  v      = w / sqrt(|w|^2 + v_eps)           w = act(conv_v W_v x), `v_conv`
  a      = phi(conv_a W_a x)                 target codes, `alpha_conv`
  b      = sigmoid(w_b x + c_b)              forget gate, starting near `forget_init`, or of the
                                             form exp(-A softplus(w_b x + c_b)), `forget_form`
  g      = step_scale sigmoid(w_g x + c_g)   inner step, starting near `step_init`
  o      = trellis(q, k, v, a, log b, g)
  y      = W_o (norm(o) * gelu(W_gate x))

The paper leaves several of these open; each is a knob of `Config` (trellis_config.py), whose
`literal()` is the most literal reading. Chunks are linearised (`curvature`, docs/method.md). In
stale ones, which are the paper's, all inner gradients are taken at one point, so C tokens with
alike keys overshoot unless C g |w|^2 < 2: hence unit writes and, in those, steps that start at
1 / C.

`ops/two_pass.py` has the family in one table: how ABC becomes GSA becomes Trellis.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trellis_jax import affine_mixer, nn, sharding
from trellis_jax.ops import activations, backends
from trellis_jax.ops.grid import Grid, runs_of
from trellis_jax.ops.state import TrellisState
from trellis_jax.ops.trellis import trellis
from trellis_jax.trellis_config import Config
from trellis_jax.typing import Array, Hidden, SegmentIds, Tokens

# What the A of `forget_form` "rate" start between, as in Gated DeltaNet; above 0 for their log.
RATES = (1.6e-2, 16.0)


def targets(c: Config, alpha: Array) -> Array:
  """Returns the target codes [..., M] of W_a x, `alpha`, in its dtype."""
  if c.target == "linear":
    return alpha
  wide = alpha.astype(jnp.promote_types(alpha.dtype, jnp.float32))
  if c.target == "phi":
    return activations.activate(c.phi, c.phi_eps, wide).astype(alpha.dtype)
  return jax.nn.standardize(wide, axis=-1, epsilon=c.eps).astype(alpha.dtype)


def implementations() -> tuple[str, ...]:
  """Returns the names that `implementation=` takes."""
  return ("reference", "xla", *backends.kernels())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """memory: of the op; taps: the last K - 1 inputs of the convolutions of q and k [B, K-1, W].

  v_taps, alpha_taps: of those of v and of alpha, None without one.
  """

  memory: TrellisState
  taps: Array
  v_taps: Array | None = None
  alpha_taps: Array | None = None


class Mixer(nnx.Module):
  """The Trellis mixer; see the module's equations."""

  def __init__(
    self,
    width: int,
    num_heads: int,
    config: Config | None = None,
    *,
    out_features: int | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    init_std: float | None = None,
    out_scale: float = 1.0,
    precision: jax.lax.PrecisionLike = None,
    projections: Mapping[str, Any] = types.MappingProxyType({}),
    out_projection: Mapping[str, Any] = types.MappingProxyType({}),
    rngs: nnx.Rngs,
  ):
    """Builds the parameters.

    Args:
      width: of the input.
      num_heads: H.
      config: the knobs.
      out_features: width of the output; None is `width`.
      dtype: of the computation outside of the memories, which are fp32.
      param_dtype: of the parameters.
      init_std: of the projections; None is inputs**-0.5.
      out_scale: factor on the output map's initial values.
      precision: of the op's matrix products.
      projections: keywords of nnx.Linear for the maps of q, k, v, alpha and the output gate, on top
        of the above (kernel_init, use_bias, dot_general, ...).
      out_projection: the same for the output map.
      rngs: of the initial values.
    """
    c = self.config = config or Config()
    if width % num_heads and not c.head_dim:
      raise ValueError(f"width={width} does not divide into num_heads={num_heads}; set head_dim")
    self.width, self.num_heads, self.precision, self.dtype = width, num_heads, precision, dtype
    d = self.head_dim = c.head_dim or width // num_heads
    v = self.value_dim = c.value_dim or d
    kw = dict(dtype=dtype, param_dtype=param_dtype)
    maps = dict(init_std=init_std, rngs=rngs) | kw | projections
    project = lambda n: nn.linear(width, num_heads * n, **maps)
    self.qk = project(d if c.share_qk else 2 * d)
    taps = dict(taps=c.conv_taps, spread=c.conv_spread, rngs=rngs) | kw
    if c.conv_taps > 1:
      conv = functools.partial(nn.ShortConv, num_heads * d, activation=c.conv_activation, **taps)
      self.conv_q, self.conv_k = conv(), conv(decay=c.conv_decay)
    self.v, self.alpha = project(v), project(c.num_slots)
    for name, wanted, size in (("v", c.v_conv, v), ("alpha", c.alpha_conv, c.num_slots)):
      if wanted:
        setattr(self, f"conv_{name}", nn.ShortConv(num_heads * size, activation="none", **taps))
    gates = c.forget + (c.step_form != "constant")
    if gates:
      # Narrow and near zero, so that the gates start at their biases.
      self.gates = nn.linear(width, gates * num_heads, init_std=0.2 * width**-0.5, rngs=rngs, **kw)
    if c.forget:
      self._build_forget_gate(param_dtype, rngs)
    self.step_bias = nnx.Param(jnp.full((num_heads,), self._step_bias(), param_dtype))
    if c.initial_memory == "learned":
      start = lambda n: c.memory_std * rngs.params.normal((num_heads, c.num_slots, n), param_dtype)
      self.memory_k, self.memory_v = nnx.Param(start(d)), nnx.Param(start(v))
    std = ((num_heads * v) ** -0.5 if init_std is None else init_std) * out_scale
    self.output = nn.Output(
      width,
      num_heads,
      v,
      out_features=out_features,
      gate=c.gate,
      post_norm=c.post_norm,
      maps=dict(init_std=init_std) | projections,
      out_map=dict(init_std=std) | out_projection,
      rngs=rngs,
      **kw,
    )

  def _build_forget_gate(self, param_dtype, rngs: nnx.Rngs) -> None:
    c, heads = self.config, self.num_heads
    if c.forget_form == "rate":
      self.forget_bias = nnx.Param(affine_mixer.step_bias(heads, rngs, param_dtype))
      self.log_rate = nnx.Param(affine_mixer.log_rate(heads, rngs, param_dtype, *RATES))
    else:
      start = math.log(c.forget_init / (1 - c.forget_init))
      self.forget_bias = nnx.Param(jnp.full((heads,), start, param_dtype))

  def _step_bias(self) -> float:
    c = self.config
    if c.step_form == "sigmoid":
      return -math.log(c.step_scale / c.start_step - 1)
    return math.log(math.expm1(c.start_step))

  def __call__(
    self,
    x: Hidden,
    state: State | None = None,
    *,
    segment_ids: SegmentIds | None = None,
    positions: Tokens | None = None,
    implementation: str | None = None,
  ) -> tuple[Hidden, State]:
    """Mixes the tokens of x; see `base.MixerProtocol`. Positions are not used."""
    if segment_ids is None or x.shape[1] == 1:
      return self._mix(x, state, segment_ids, implementation)
    # Padding does not exist: the convolutions too see the live tokens side by side.
    grid = Grid.of(segment_ids != 0, jnp.zeros((x.shape[0],), jnp.int32), x.shape[1])
    y, state = self._mix(grid.spread(x), state, grid.spread(segment_ids), implementation)
    return grid.collect(y), state

  def _mix(self, x, state, segment_ids, implementation):
    inputs, taps = self.op_inputs(x, state, segment_ids)
    o, memory = trellis(
      *inputs,
      initial_memory=self.initial_memory(),
      initial_state=None if state is None else state.memory,
      segment_ids=segment_ids,
      implementation=implementation,
      **self.op_knobs(),
    )
    return self.output(o.astype(self.dtype), x), State(memory, *taps)

  def op_knobs(self) -> dict[str, Any]:
    """Returns the op's static keyword arguments."""
    names = ("phi", "f", "phi_out", "phi_eps", "eps", "chunk_size", "outer_gradient", "curvature")
    return {n: getattr(self.config, n) for n in names} | {"precision": self.precision}

  def initial_memory(self):
    """Returns the learned (S_k, S_v), or None for zeros."""
    if self.config.initial_memory == "zeros":
      return None
    return self.memory_k[...], self.memory_v[...]

  def op_inputs(self, x, state: State | None = None, segment_ids=None):
    """Returns ((q, k, v, alpha, log_beta, gamma), the convolutions' next taps) for inputs x."""
    c = self.config
    heads = lambda y: y.reshape(*y.shape[:2], self.num_heads, -1)
    state = sharding.like(state or self.init_state(x.shape[0]), x)
    run = count = None
    if segment_ids is not None:
      run = runs_of(segment_ids, state.memory.segment)
      count = jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
    h, v, alpha = self.qk(x), self.v(x), self.alpha(x)
    taps, v_taps, alpha_taps = sharding.like(state.taps, h), state.v_taps, state.alpha_taps
    q, k = (h, h) if c.share_qk else jnp.split(h, 2, axis=-1)
    if c.conv_taps > 1:
      bq, bk = (taps, taps) if c.share_qk else jnp.split(taps, 2, axis=-1)
      q, k = self.conv_q(q, bq, run), self.conv_k(k, bk, run)
    taps = nn.last_taps(h, taps, run, count)

    def convolved(conv, y, before):
      before = sharding.like(before, y)
      return conv(y, before, run), nn.last_taps(y, before, run, count)

    if c.v_conv:
      v, v_taps = convolved(self.conv_v, v, v_taps)
    if c.alpha_conv:
      alpha, alpha_taps = convolved(self.conv_alpha, alpha, alpha_taps)
    if c.v_activation != "none":
      v = getattr(jax.nn, c.v_activation)(v)
    q, k, v, alpha = heads(q), heads(k), heads(v), heads(alpha)
    if c.qk_norm == "l2":
      q, k = nn.unit(q), nn.unit(k)
    if c.v_norm == "l2":
      v = nn.unit(v, c.v_eps)
    return (q, k, v, targets(c, alpha), *self._gates(x)), (taps, v_taps, alpha_taps)

  def _gates(self, x):
    """Returns (log_beta, gamma) [B, T, H] in fp32."""
    c = self.config
    shape = (*x.shape[:2], self.num_heads)
    raw = []
    if c.forget or c.step_form != "constant":
      gates = self.gates(x).astype(jnp.float32)
      raw = jnp.split(gates, gates.shape[-1] // self.num_heads, axis=-1)
    log_beta = jnp.zeros(shape, jnp.float32)
    if c.forget:
      forget, forget_bias = raw.pop(0), self.forget_bias[...]
      if c.forget_form == "rate":
        _, log_beta = affine_mixer.step_and_decay(forget, forget_bias, self.log_rate[...])
      else:
        log_beta = jax.nn.log_sigmoid(forget + forget_bias[None, None])
    bias = self.step_bias[...][None, None].astype(jnp.float32)
    if c.step_form == "constant":
      return log_beta, jnp.broadcast_to(jax.nn.softplus(bias), shape)
    if c.step_form == "softplus":
      return log_beta, jax.nn.softplus(raw.pop(0) + bias)
    return log_beta, c.step_scale * jax.nn.sigmoid(raw.pop(0) + bias)

  def init_state(self, batch: int) -> State:
    """Returns the state of `batch` rows before their first token."""
    c = self.config
    shape = lambda n: (self.num_heads, c.num_slots, n)
    memory = self.initial_memory() or (
      jnp.zeros(shape(self.head_dim)),
      jnp.zeros(shape(self.value_dim)),
    )
    memory = tuple(s.astype(jnp.promote_types(self.dtype, jnp.float32)) for s in memory)
    zeros = lambda maps: jnp.zeros((batch, c.conv_taps - 1, maps.out_features), self.dtype)
    taps = [zeros(self.v) if c.v_conv else None, zeros(self.alpha) if c.alpha_conv else None]
    return State(TrellisState.fresh(memory, batch, c.chunk_size), zeros(self.qk), *taps)

  def flops(self, num_tokens: int) -> int:
    """Returns the forward FLOPs of one row: projections, then 10 products per chunk and head.

    Linearised chunks have 4 more, and an inverse for each pass.
    """
    c, d, v = self.config, self.head_dim, self.value_dim
    m, chunk = c.num_slots, c.chunk_size
    maps = self.qk.in_features * (self.qk.out_features + self.num_heads * (v + m + 2))
    maps += self.output.num_weights
    memory = 3 * m * (d + v) + chunk * (d + m) + chunk * (m + v)
    if c.curvature and chunk > 1:
      memory += chunk * (d + v) + 2 * chunk * m + 2 * chunk * chunk // 3
    return 2 * num_tokens * (maps + self.num_heads * memory)

  def state_size(self) -> int:
    """Returns the numbers one row carries: memories, chunk-start memories for C > 1, taps."""
    c = self.config
    memory = self.num_heads * c.num_slots * (self.head_dim + self.value_dim)
    convolved = self.qk.out_features
    convolved += c.v_conv * self.v.out_features + c.alpha_conv * self.alpha.out_features
    taps = (c.conv_taps - 1) * convolved
    return memory * (1 if c.chunk_size == 1 else 2) + taps

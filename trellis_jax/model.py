"""The language model: embedding, N x [x + mixer(norm x); x + mlp(norm x)], norm, linear head."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import freeze

from trellis_jax import mixers, nn
from trellis_jax.typing import Array, Hidden, Logits, SegmentIds, Tokens

# What the backward of a layer keeps, by name: "none" keeps all, "full" the layer's input alone.
REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class LMConfig:
  """A language model.

  Attributes:
    vocab_size: tokens of the vocabulary.
    width: of the residual stream.
    num_layers: blocks.
    num_heads: H of every mixer; divides width unless the mixer sets its own head width.
    mlp_width: hidden width of the SwiGLU; 0 is 8/3 width rounded up to 64.
    mixer: a name of `trellis_jax.mixers`, or a pattern of names that the layers repeat.
    mixers: knobs by mixer name, e.g. {"trellis": {"num_slots": 32}}.
    tie_embeddings: whether the head is the transposed embedding.
    remat: a name of REMAT.
    scan_layers: whether the repeated layers are one scan, which compiles once whatever their
      number; without, they stand one after the other, and what the backward keeps is not copied
      into arrays over all layers.
    norm_eps: of the RMSNorms.
    init_std: of the projections; 0 is inputs**-0.5. What adds to the residual stream is scaled by
      1 / sqrt(2 num_layers) on top.
    embed_std: of the embedding; 0 is 0.02 when tied, so that a token does not predict itself at
      the start, and 1 when not.
    dtype: of the computation; memories, norms' statistics and logits' sums are fp32.
    param_dtype: of the parameters.
  """

  vocab_size: int
  width: int = 256
  num_layers: int = 6
  num_heads: int = 4
  mlp_width: int = 0
  mixer: str | tuple[str, ...] = "trellis"
  mixers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  tie_embeddings: bool = True
  remat: str = "none"
  scan_layers: bool = True
  norm_eps: float = 1e-6
  init_std: float = 0.0
  embed_std: float = 0.0
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    # Hashable, as a static part of jitted functions must be.
    object.__setattr__(self, "mixers", freeze({k: dict(v) for k, v in self.mixers.items()}))
    if not isinstance(self.mixer, str):
      object.__setattr__(self, "mixer", tuple(self.mixer))
    for field in ("vocab_size", "width", "num_layers", "num_heads"):
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field}={value!r} is not accepted; it must be an integer >= 1")
    if self.remat not in REMAT:
      raise ValueError(f"remat={self.remat!r} is unknown; accepted are {', '.join(REMAT)}")
    for field in ("dtype", "param_dtype"):
      value = getattr(self, field)
      if value not in ("float32", "bfloat16", "float16", "float64"):
        raise ValueError(f"{field}={value!r} is unknown; accepted are float32, bfloat16, float16")
    for name in (*self.pattern, *self.mixers):
      mixers.configure(name, self.mixers.get(name))

  @property
  def pattern(self) -> tuple[str, ...]:
    """The mixers' names, one per layer of the repeated pattern."""
    return (self.mixer,) if isinstance(self.mixer, str) else self.mixer

  @property
  def hidden_width(self) -> int:
    """The SwiGLU's hidden width."""
    return self.mlp_width or math.ceil(8 * self.width / 3 / 64) * 64


class Block(nnx.Module):
  """x + mixer(norm x), then x + mlp(norm x)."""

  def __init__(self, cfg: LMConfig, mixer: str, *, rngs: nnx.Rngs):
    kw = dict(dtype=jnp.dtype(cfg.dtype), param_dtype=jnp.dtype(cfg.param_dtype), rngs=rngs)
    init = dict(init_std=cfg.init_std or None, out_scale=(2 * cfg.num_layers) ** -0.5)
    norm = lambda: nnx.RMSNorm(cfg.width, epsilon=cfg.norm_eps, **kw)
    config = mixers.configure(mixer, cfg.mixers.get(mixer))
    self.mixer_name = mixer
    self.mixer_norm, self.mlp_norm = norm(), norm()
    self.mixer = mixers.get(mixer).Mixer(cfg.width, cfg.num_heads, config, **init, **kw)
    self.mlp = nn.SwiGLU(cfg.width, cfg.hidden_width, **init, **kw)

  def __call__(self, x: Hidden, state: Any = None, **kw) -> tuple[Hidden, Any]:
    """Returns (x after the block, the mixer's state)."""
    y, state = self.mixer(self.mixer_norm(x), state, **kw)
    x = x + y
    return x + self.mlp(self.mlp_norm(x)), state


class LM(nnx.Module):
  """A causal language model over any mixers; parameters of repeated layers are stacked."""

  def __init__(self, cfg: LMConfig, *, rngs: nnx.Rngs):
    """Builds the parameters; raises ValueError when a mixer refuses the sizes."""
    self.cfg = cfg
    dtype, param_dtype = jnp.dtype(cfg.dtype), jnp.dtype(cfg.param_dtype)
    std = cfg.embed_std or (0.02 if cfg.tie_embeddings else 1.0)
    shape = (cfg.vocab_size, cfg.width)
    self.embedding = nnx.Param(std * rngs.params.normal(shape, param_dtype))
    repeats, rest = divmod(cfg.num_layers, len(cfg.pattern))
    self.repeated = nnx.List([])
    if repeats:
      self.repeated = nnx.List([_stack(cfg, name, repeats, rngs) for name in cfg.pattern])
    self.rest = nnx.List([Block(cfg, name, rngs=rngs) for name in cfg.pattern[:rest]])
    self.norm = nnx.RMSNorm(
      cfg.width, epsilon=cfg.norm_eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )
    if not cfg.tie_embeddings:
      head = (cfg.init_std or cfg.width**-0.5) * rngs.params.normal(shape[::-1], param_dtype)
      self.head = nnx.Param(head)

  def __call__(
    self,
    tokens: Tokens,
    state: Any = None,
    *,
    segment_ids: SegmentIds | None = None,
    positions: Tokens | None = None,
    implementation: str | None = None,
  ) -> tuple[Logits, Any]:
    """Returns (logits [B, T, vocab_size] in fp32, the state after the last token).

    Args:
      tokens: [B, T].
      state: what an earlier call returned, to go on from; None for fresh rows.
      segment_ids: documents of a packed row; 0 is padding.
      positions: of the tokens in their documents, for mixers that encode them.
      implementation: of the mixers that have one of this name; see `mixers.assign`.
    """
    x, state = self.hidden(
      tokens, state, segment_ids=segment_ids, positions=positions, implementation=implementation
    )
    kernel = self.head_kernel()
    logits = jnp.einsum("btd,dv->btv", x, kernel, preferred_element_type=jnp.float32)
    return logits, state

  def hidden(
    self,
    tokens: Tokens,
    state: Any = None,
    *,
    segment_ids: SegmentIds | None = None,
    positions: Tokens | None = None,
    implementation: str | None = None,
  ) -> tuple[Hidden, Any]:
    """Returns (the head's input [B, T, width], state); as `__call__` up to the head."""
    kw = dict(segment_ids=segment_ids, positions=positions)
    chosen = mixers.assign(implementation, self.cfg.pattern)

    def run(block, x, state):
      return block(x, state, implementation=chosen[block.mixer_name], **kw)

    x, state = self.over_layers(run, self.embed(tokens), state)
    return self.norm(x), state

  def embed(self, tokens: Tokens) -> Hidden:
    """Returns the tokens' embeddings in the compute dtype."""
    return jnp.take(self.embedding[...], tokens, axis=0).astype(jnp.dtype(self.cfg.dtype))

  def head_kernel(self) -> Array:
    """Returns the head [width, vocab_size] in the compute dtype."""
    kernel = self.embedding[...].T if self.cfg.tie_embeddings else self.head[...]
    return kernel.astype(jnp.dtype(self.cfg.dtype))

  def over_layers(self, run, x, state: Any = None) -> tuple[Any, Any]:
    """Takes `run(block, x, block_state) -> (x, out)` through all layers.

    Returns (x, outs): outs is (repeated, rest), as a state is; repeated outs have a leading axis
    over the repetitions of the pattern.
    """
    repeated, rest = state if state is not None else (None, None)
    graphs, params = zip(*(nnx.split(b) for b in self.repeated)) if self.repeated else ((), ())
    policy = REMAT[self.cfg.remat]

    def body(x, xs):
      params, states = xs
      outs = []
      for i, graph in enumerate(graphs):
        x, out = run(nnx.merge(graph, params[i]), x, None if states is None else states[i])
        outs.append(out)
      return x, tuple(outs)

    if policy is not None:
      # In a scan nothing of the forward is in the backward's reach; outside of one it is.
      body = jax.checkpoint(body, policy=policy, prevent_cse=not self.cfg.scan_layers)
    outs = ()
    if graphs and self.cfg.scan_layers:
      x, outs = jax.lax.scan(body, x, (params, repeated))
    elif graphs:
      by_layer = []
      for i in range(self.cfg.num_layers // len(graphs)):
        x, out = body(x, jax.tree.map(lambda leaf, i=i: leaf[i], (params, repeated)))
        by_layer.append(out)
      outs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *by_layer)
    rest_outs = []
    for i, block in enumerate(self.rest):
      x, out = run(block, x, None if rest is None else rest[i])
      rest_outs.append(out)
    return x, (outs, tuple(rest_outs))

  def init_state(self, batch: int) -> Any:
    """Returns the state of `batch` rows before their first token."""

    def run(block, x, _):
      return x, block.mixer.init_state(batch)

    return self.over_layers(run, jnp.zeros(()))[1]

  def blocks(self) -> list[tuple[int, Block]]:
    """Returns (how often, block) for each distinct block, for counting."""
    repeats = self.cfg.num_layers // len(self.cfg.pattern)
    return [(repeats, b) for b in self.repeated] + [(1, b) for b in self.rest]

  def flops(self, num_tokens: int) -> int:
    """Returns a forward's FLOPs over one row of T tokens, head included, 2 per multiply-add."""
    cfg = self.cfg
    mlp = 6 * cfg.width * cfg.hidden_width * num_tokens
    layers = sum(n * (b.mixer.flops(num_tokens) + mlp) for n, b in self.blocks())
    return layers + 2 * num_tokens * cfg.width * cfg.vocab_size

  def state_size(self) -> int:
    """Returns the numbers one row carries from token to token, over all layers."""
    return sum(n * b.mixer.state_size() for n, b in self.blocks())


def _stack(cfg: LMConfig, mixer: str, repeats: int, rngs: nnx.Rngs) -> Block:
  """Returns a Block whose parameters have a leading axis of `repeats`, each drawn on its own."""

  @nnx.split_rngs(splits=repeats)
  @nnx.vmap(in_axes=0, out_axes=0)
  def make(rngs):
    return Block(cfg, mixer, rngs=rngs)

  return make(rngs)

"""What benchmarks/parity.py compares: one function per recurrence, ours beside the reference's.

A case draws its arrays in our layout, [B, T, H, ...], and returns (their sizes, ours, the
reference's), both as (outputs, final state) or (outputs,). Gates are those that the mixer makes.
"""

import importlib.util
import itertools
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from trellis_jax.ops import affine as affine_op
from trellis_jax.ops import attention
from trellis_jax.ops import fast_weights as fast

REPOSITORIES = {
  "fla": "github.com/fla-org/flash-linear-attention",
  "ttt": "github.com/test-time-training/ttt-lm-pytorch",
}
B, T, H, K, V, M = 2, 67, 3, 16, 24, 8
C = 16  # mini-batch of TTT


class Case(NamedTuple):
  """run(the reference's module, rng) -> (sizes, ours, the reference's)."""

  mixer: str
  repository: str
  file: str
  function: str
  run: Callable[[Any, np.random.Generator], tuple[str, tuple, tuple]]


def load(folder: pathlib.Path, case: Case) -> types.ModuleType:
  """Returns the module of a reference file by its path; FileNotFoundError if it is not there."""
  path = folder / case.file
  if not path.is_file():
    name = case.repository
    raise FileNotFoundError(
      f"{path} does not exist; --{name} takes a checkout of {REPOSITORIES[name]}"
    )
  spec = importlib.util.spec_from_file_location(f"reference_{case.repository}_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  stand_ins = {} if case.repository == "fla" else _no_transformers()
  stand_ins = {name: x for name, x in stand_ins.items() if name not in sys.modules}
  sys.modules |= {spec.name: module, **stand_ins}  # dataclasses look their module up
  try:
    spec.loader.exec_module(module)
  finally:
    for name in stand_ins:
      del sys.modules[name]
  return module


def _no_transformers() -> dict[str, types.ModuleType]:
  """Empty stand-ins for what the TTT file imports of transformers and its layers do not use."""
  base = lambda name: type(name, (), {"__init_subclass__": classmethod(lambda cls, **kw: None)})
  names = {
    "transformers": ("PretrainedConfig",),
    "transformers.activations": ("ACT2FN",),
    "transformers.modeling_outputs": ("BaseModelOutputWithPast", "CausalLMOutputWithPast"),
    "transformers.modeling_utils": ("PreTrainedModel",),
    "transformers.utils": ("ModelOutput",),
    "transformers.utils.import_utils": (),
  }
  modules = {name: types.ModuleType(name) for name in names}
  for name, classes in names.items():
    for cls in classes:
      setattr(modules[name], cls, base(cls))
  modules["transformers.utils"].logging = mock.MagicMock()
  modules["transformers.utils.import_utils"].is_causal_conv1d_available = lambda: False
  return modules


def _torch(x):
  import torch

  return torch.from_numpy(np.array(x, np.float32))


def _heads_first(x):
  return _torch(x).transpose(1, 2).contiguous()


def _numpy(x):
  return jax.tree.map(lambda a: a.detach().numpy(), x)


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


class _Draw:
  """Arrays of a trained layer's sizes; `start` is a state to go on from."""

  def __init__(self, rng: np.random.Generator):
    self.normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    self.q, self.k, self.v = (self.normal(B, T, H, n) for n in (K, K, V))
    self.unit_k = self.k / np.linalg.norm(self.k, axis=-1, keepdims=True)
    self.start = self.normal(B, H, K, V)
    self.beta = _sigmoid(self.normal(B, T, H))

  def log_gate(self, *axes: int):
    """log sigmoid(x)^(1/16), GLA's."""
    return np.log(_sigmoid(self.normal(B, T, H, *axes))) / 16


_SIZES = f"B {B}, T {T}, H {H}, K {K}, V {V}"


@jax.jit
def _affine(q, k, w, log_decay=None, beta=None, initial=None):
  return affine_op.affine(q, k, w, log_decay=log_decay, beta=beta, initial=initial)


def _linear_attention(ref, rng):
  d = _Draw(rng)
  q, k = (np.where(x > 0, x + 1, np.exp(x)) for x in (d.q, d.k))  # elu + 1
  o, s = _affine(q, k, d.v)
  total, _ = _affine(q, k, np.ones((B, T, H, 1), np.float32))
  want, (state, _) = ref.naive_recurrent_linear_attn(
    *map(_torch, (q, k, d.v)), scale=1.0, output_final_state=True, normalize=True
  )
  return _SIZES, (o / total, s), (_numpy(want), _numpy(state))


def _retention(ref, rng):
  d = _Draw(rng)
  v = d.v[..., :K]
  log_decay = np.log1p(-(2.0 ** (-5 - np.arange(H))))
  o, _ = _affine(d.q * K**-0.5, d.k, v, np.broadcast_to(log_decay, (B, T, H)))
  want = ref.naive_retention(*map(_heads_first, (d.q, d.k, v)))
  return f"B {B}, T {T}, H {H}, K V {K}", (o,), (_numpy(want.transpose(1, 2)),)


def _gla(ref, rng, hgrn2=False):
  d = _Draw(rng)
  gate = np.log(0.5 + 0.5 * _sigmoid(d.k)) if hgrn2 else d.log_gate(K)
  k = 1 - np.exp(gate) if hgrn2 else d.k
  got = _affine(d.q * K**-0.5, k, d.v, gate, None, d.start)
  want = ref.naive_recurrent_gla(
    *map(_torch, (d.q, k, d.v, gate)), initial_state=_torch(d.start), output_final_state=True
  )
  return _SIZES, got, _numpy(want)


def _hgrn2(ref, rng):
  return _gla(ref, rng, hgrn2=True)


def _mamba2(chunked: bool):
  def run(ref, rng):
    d = _Draw(rng)
    step = np.log1p(np.exp(d.normal(B, T, H) - 2))  # softplus
    log_decay = -step * rng.uniform(1, 16, H).astype(np.float32)
    arrays = (d.q, d.k, d.v * step[..., None], log_decay)
    got = _affine(*arrays, None, d.start)
    function = ref.naive_chunk_simple_gla if chunked else ref.naive_recurrent_simple_gla
    length = T - T % 64 if chunked else T  # padding would decay the chunked reference's state
    if chunked:
      arrays = tuple(x[:, :length] for x in arrays)
      got = _affine(*arrays, None, d.start)
    kw = dict(scale=1.0, initial_state=_torch(d.start), output_final_state=True)
    want = function(*map(_torch, arrays), **kw)
    return _SIZES.replace(f"T {T}", f"T {length}"), got, _numpy(want)

  return run


def _delta(ref, rng):
  d = _Draw(rng)
  got = _affine(d.q * K**-0.5, d.unit_k, d.beta[..., None] * d.v, None, d.beta, d.start)
  o, state = ref.delta_rule_recurrence(
    *map(_heads_first, (d.q, d.unit_k, d.v, d.beta)), initial_state=_torch(d.start)
  )
  return _SIZES, got, _numpy((o.transpose(1, 2), state))


def _gated_delta(ref, rng):
  d = _Draw(rng)
  gate = -np.exp(d.normal(B, T, H) - 2)
  got = _affine(d.q * K**-0.5, d.unit_k, d.beta[..., None] * d.v, gate, d.beta, d.start)
  want = ref.naive_recurrent_gated_delta_rule(
    *map(_torch, (d.q, d.unit_k, d.v, d.beta, gate)),
    initial_state=_torch(d.start),
    output_final_state=True,
  )
  return _SIZES, got, _numpy(want)


@jax.jit
def _slots(q, k, v, s, gate, start):
  """Two passes over M slots: scores against the slots' keys, then the slots' values."""
  scores, keys = affine_op.affine(
    q * K**-0.5, k, s, log_decay=gate, decay_axis="value", initial=start[0]
  )
  p = jax.nn.softmax(scores, axis=-1)
  o, values = affine_op.affine(p, s, v, log_decay=gate, initial=start[1])
  return o, (keys, values)


def _gsa(ref, rng, forget=True):
  d = _Draw(rng)
  if forget:
    gate = np.log(_sigmoid(d.normal(B, T, H, M))) / 8
    s = 1 - np.exp(gate)
  else:
    s = np.asarray(jax.nn.softmax(d.normal(B, T, H, M)))
    gate = np.zeros_like(s)
  start = d.normal(B, H, K, M), d.normal(B, H, M, V)
  arrays = (d.q, d.k, d.v, s, gate)
  got = _slots(*arrays, start)
  kw = dict(initial_state=tuple(map(_torch, start)), output_final_state=True)
  if forget:
    want, state = ref.naive_recurrent_gsa(*map(_torch, arrays), **kw)
  else:
    want, state = ref.naive_recurrent_abc(*map(_heads_first, arrays), **kw)
    want = want.transpose(1, 2)
  return f"{_SIZES}, M {M}", got, (_numpy(want), _numpy(state))


def _abc(ref, rng):
  return _gsa(ref, rng, forget=False)


def _attention(ref, rng):
  d = _Draw(rng)
  q, k, v = d.normal(B, 300, 2 * H, K), d.normal(B, 300, H, K), d.normal(B, 300, H, K)
  got = attention.attend(q, k, v, window=40)
  want, _ = ref.naive_parallel_attn(*map(_torch, (q, k, v)), window_size=40)
  return f"B {B}, T 300, H {2 * H}, 3 of keys, D {K}, window 40", (got,), (_numpy(want),)


def _layer_norm(z, weight, bias):
  return jax.nn.standardize(z, axis=-1, epsilon=1e-6) * weight + bias


def _ttt(mlp: bool, primal: bool):
  """TTT in the reference's dual form, or in its primal one, which takes one mini-batch."""

  def run(ref, rng):
    import torch

    length, d = C if primal else 4 * C, 8
    config = types.SimpleNamespace(
      hidden_size=H * d,
      num_attention_heads=H,
      mini_batch_size=C,
      share_qk=False,
      conv_kernel=4,
      use_gate=False,
      rope_theta=1e4,
      ttt_base_lr=1.0,
      scan_checkpoint_group_size=0,
    )
    torch.manual_seed(0)
    layer = (ref.TTTMLP if mlp else ref.TTTLinear)(config, layer_idx=0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    q, k, v = (normal(B, length, H, d) for _ in range(3))
    step, scale = _sigmoid(normal(B, length, H)) / d, 1 / np.arange(1, C + 1, dtype=np.float32)
    weight, bias = 1 + 0.1 * normal(H, d), 0.1 * normal(H, d)
    widths = (d, 4 * d, d) if mlp else (d, d)
    network = [
      (normal(H, n, m) * n**-0.5, 0.1 * normal(H, m)) for n, m in itertools.pairwise(widths)
    ]
    init = tuple(fast.Layer(*map(jnp.asarray, x)) for x in network)

    def loss(z, k, v):
      miss = _layer_norm(z, weight[None, :, None], bias[None, :, None]) - (v - k)
      return 0.5 * jnp.sum(miss * miss, axis=-1)

    rule = fast.TTT(jnp.asarray(scale))
    ours = map(jnp.asarray, (q, k, v))
    z, state = fast.fast_weights(rule, loss, init, *ours, (jnp.asarray(step),), chunk_size=C)
    got = q + _layer_norm(z, weight[None, None], bias[None, None])

    batches = lambda x: _heads_first(x).reshape(B, H, length // C, C, *x.shape[3:])
    with torch.no_grad():
      layer.ttt_norm_weight.copy_(_torch(weight))
      layer.ttt_norm_bias.copy_(_torch(bias))
    lr, token = batches(step)[..., None, :], _torch(scale).reshape(1, 1, 1, C, 1)
    token = token.broadcast_to(B, H, length // C, C, 1)
    inputs = {"XQ": batches(q), "XK": batches(k), "XV": batches(v)}
    inputs |= {"eta": token * lr, "token_eta": token, "ttt_lr_eta": lr}
    start = {}
    for i, (w, b) in enumerate(network, 1):
      tile = lambda x: _torch(x)[None].repeat(B, 1, 1, 1)
      start |= {f"W{i}_states": tile(w), f"b{i}_states": tile(b[:, None])}
      start |= {f"W{i}_grad": torch.zeros_like(tile(w)), f"b{i}_grad": tile(0 * b[:, None])}
    cache = None
    if primal:  # which runs with a cache, in mini-batches that are not whole
      layer.mini_batch_size = C + 1
      cache = types.SimpleNamespace(update=lambda *_: None)
    want, end = layer.ttt(inputs, C, start, cache)
    ends = [(end[f"W{i}_states"], end[f"b{i}_states"][:, :, 0]) for i in range(1, len(network) + 1)]
    sizes = f"B {B}, T {length}, H {H}, D {d}, C {C}"
    got_end = [(x.weight, x.bias) for x in state.memory.weights]
    return sizes, (got, got_end), (_numpy(want.reshape(B, length, H, d)), _numpy(ends))

  return run


def _fla(mixer: str, folder: str, function: str, run) -> Case:
  return Case(mixer, "fla", f"fla/ops/{folder}/naive.py", function, run)


CASES = (
  _fla("attention", "attn", "naive_parallel_attn", _attention),
  _fla("linear_attention", "linear_attn", "naive_recurrent_linear_attn", _linear_attention),
  _fla("retnet", "retention", "naive_retention", _retention),
  _fla("gla", "gla", "naive_recurrent_gla", _gla),
  _fla("hgrn2", "gla", "naive_recurrent_gla", _hgrn2),
  _fla("mamba2", "simple_gla", "naive_recurrent_simple_gla", _mamba2(chunked=False)),
  _fla("mamba2", "simple_gla", "naive_chunk_simple_gla", _mamba2(chunked=True)),
  _fla("delta_net", "delta_rule", "delta_rule_recurrence", _delta),
  _fla("gated_delta_net", "gated_delta_rule", "naive_recurrent_gated_delta_rule", _gated_delta),
  _fla("gsa", "gsa", "naive_recurrent_gsa", _gsa),
  _fla("abc", "abc", "naive_recurrent_abc", _abc),
  Case("ttt_linear", "ttt", "ttt.py", "TTTLinear.ttt, dual", _ttt(mlp=False, primal=False)),
  Case("ttt_linear", "ttt", "ttt.py", "TTTLinear.ttt, primal", _ttt(mlp=False, primal=True)),
  Case("ttt_mlp", "ttt", "ttt.py", "TTTMLP.ttt, dual", _ttt(mlp=True, primal=False)),
  Case("ttt_mlp", "ttt", "ttt.py", "TTTMLP.ttt, primal", _ttt(mlp=True, primal=True)),
)

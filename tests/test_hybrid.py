"""Hybrids: layers of several mixers in one model train, split, pack and decode as one."""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from flax import nnx

from trellis_jax import LM, LMConfig, generate

jax.config.update("jax_numpy_rank_promotion", "raise")

VOCAB, T = 23, 14
KNOBS = {
  "trellis": dict(num_slots=6, chunk_size=4),
  "attention": dict(window=5, num_kv_heads=1),
}
PROMPTS = ([3, 1, 4, 1, 5, 9, 2], [2, 7], [1, 8, 2, 8, 1])


@pytest.fixture(scope="module")
def lm():
  # Three layers of a pattern of two: one repetition, and a layer that is left.
  cfg = LMConfig(
    VOCAB, 16, 3, 2, mlp_width=24, mixer=("trellis", "attention"), mixers=KNOBS, init_std=0.3
  )
  return LM(cfg, rngs=nnx.Rngs(0))


def _tokens(batch=2, length=T):
  return jax.random.randint(jax.random.key(1), (batch, length), 0, VOCAB)


_run = nnx.jit(lambda lm, tokens, state=None, ids=None: lm(tokens, state, segment_ids=ids))


def test_the_config_takes_a_pattern():
  from experiments import config

  flags = ["--config.model.mixer=trellis, attention", "--config.model.attention.window=64"]
  cfg = config.lm_config(config.parse(["", *flags]).model, VOCAB)
  assert cfg.pattern == ("trellis", "attention") and cfg.mixers["attention"]["window"] == 64


def test_it_trains(lm):
  graph, params = nnx.split(lm)
  tokens = _tokens(4)

  def loss(params):
    logits, _ = nnx.merge(graph, params)(tokens[:, :-1])
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1))

  step = jax.jit(jax.value_and_grad(loss))
  first, grads = step(params)
  assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads))
  for _ in range(30):
    _, grads = step(params)
    params = jax.tree.map(lambda p, g: p - 0.1 * jnp.sign(g) * jnp.mean(jnp.abs(p)), params, grads)
  assert step(params)[0] < 0.7 * first


def test_any_split_equals_one_pass(lm):
  tokens = _tokens()
  want, final = _run(lm, tokens)
  for sizes in ((1,) * T, (6, 8), (3, 1, 10)):
    outs, state, rest = [], None, tokens
    for size in sizes:
      out, state = _run(lm, rest[:, :size], state)
      outs, rest = [*outs, out], rest[:, size:]
    assert op_cases.distance(jnp.concatenate(outs, axis=1), want) <= 1e-5
    assert op_cases.distance(state, final) <= 1e-5


def _padded(left: bool):
  width = max(map(len, PROMPTS)) + 2
  tokens, mask = np.zeros((3, width), np.int32), np.zeros((3, width), bool)
  for i, p in enumerate(PROMPTS):
    at = slice(width - len(p), width) if left else slice(0, len(p))
    tokens[i, at], mask[i, at] = p, True
  return dict(prompts=tokens, prompt_mask=mask)


def test_generation_does_not_see_padding(lm):
  kw = dict(max_new_tokens=8, temperature=0.8, top_k=12, rng=5)
  want = generate(lm, PROMPTS, **kw)
  for left in (True, False):
    assert generate(lm, **_padded(left), **kw) == want
  (greedy,) = generate(lm, PROMPTS[:1], max_new_tokens=8, temperature=0)
  logits, _ = lm(jnp.asarray([[*PROMPTS[0], *greedy]]))
  assert greedy == np.argmax(np.asarray(logits[0]), axis=-1)[len(PROMPTS[0]) - 1 : -1].tolist()


def test_an_implementation_goes_to_the_mixers_that_have_it(lm):
  tokens = _tokens()
  want, _ = lm(tokens)
  for name in ("reference", "xla"):  # attention has no "reference"
    assert op_cases.distance(lm(tokens, implementation=name)[0], want) <= 1e-5
  known = "trellis: reference, xla.*; attention: xla, cudnn"
  with pytest.raises(ValueError, match=f"implementation='mosaic' is of no mixer .* {known}"):
    lm(tokens, implementation="mosaic")

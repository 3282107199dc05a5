"""Generation: any batch of prompts, any padding, the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trellis_jax import LM, LMConfig, generate

jax.config.update("jax_numpy_rank_promotion", "raise")

PROMPTS = ([3, 1, 4, 1, 5, 9, 2], [2, 7], [1, 8, 2, 8, 1])


@pytest.fixture(scope="module")
def lm():
  knobs = dict(num_slots=8, chunk_size=4, initial_memory="learned")
  cfg = LMConfig(
    vocab_size=23, width=16, num_layers=2, num_heads=2, mixers={"trellis": knobs}, init_std=0.5
  )
  return LM(cfg, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def expected(lm):
  return generate(lm, PROMPTS, max_new_tokens=9, temperature=0.8, top_k=12, top_p=0.95, rng=5)


def _padded(left: bool):
  width = max(map(len, PROMPTS)) + 2
  tokens, mask = np.zeros((3, width), np.int32), np.zeros((3, width), bool)
  for i, p in enumerate(PROMPTS):
    at = slice(width - len(p), width) if left else slice(0, len(p))
    tokens[i, at], mask[i, at] = p, True
  return tokens, mask


@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_change_the_tokens(lm, expected, left):
  tokens, mask = _padded(left)
  got = generate(
    lm, tokens, prompt_mask=mask, max_new_tokens=9, temperature=0.8, top_k=12, top_p=0.95, rng=5
  )
  assert got == expected


def test_rows_do_not_depend_on_each_other(lm):
  together = generate(lm, PROMPTS, max_new_tokens=6, temperature=0)
  for prompt, row in zip(PROMPTS, together):
    assert generate(lm, [prompt], max_new_tokens=6, temperature=0) == [row]


def test_greedy_tokens_are_the_argmax_of_the_whole_sequence(lm):
  (new,) = generate(lm, [PROMPTS[0]], max_new_tokens=6, temperature=0)
  whole = [*PROMPTS[0], *new]
  logits, _ = lm(jnp.asarray([whole]))
  want = np.argmax(np.asarray(logits[0]), axis=-1)[len(PROMPTS[0]) - 1 : -1]
  assert new == want.tolist()


def test_stop_tokens_and_streaming(lm, expected):
  stop = expected[0][2]
  seen = []
  got = generate(
    lm,
    PROMPTS,
    max_new_tokens=9,
    temperature=0.8,
    top_k=12,
    top_p=0.95,
    rng=5,
    stop_tokens=[stop],
    on_token=lambda step, tokens: seen.append(tokens),
  )
  for row, full in zip(got, expected):
    end = full.index(stop) + 1 if stop in full else len(full)
    assert row == full[:end]
  assert [int(t[0]) for t in seen if t[0] >= 0] == got[0]


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (0, 1e-6)])
def test_the_narrowest_filters_are_greedy(lm, top_k, top_p):
  got = generate(lm, PROMPTS, max_new_tokens=5, temperature=2.0, top_k=top_k, top_p=top_p)
  assert got == generate(lm, PROMPTS, max_new_tokens=5, temperature=0)


def test_seeds_differ_and_repeat(lm):
  draw = lambda seed: generate(lm, PROMPTS, max_new_tokens=12, rng=seed)
  assert draw(0) == draw(0)
  assert draw(0) != draw(1)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(temperature=-1.0), r"temperature=-1.0 .* >= 0"),
    (dict(top_k=-2), "top_k=-2"),
    (dict(top_p=0.0), r"top_p=0.0 .* \(0, 1\]"),
    (dict(stop_tokens=[23]), r"stop token 23 .* 0 \.\. 22"),
    (dict(prompts=[[1], []]), "prompt 1 has no tokens"),
    (dict(prompts=[]), "prompts is empty"),
    (dict(prompts=[[1, 99]]), r"token 99; accepted are 0 \.\. 22"),
    (dict(prompts=np.zeros((1, 2, 3), np.int32)), r"shape \(1, 2, 3\)"),
    (dict(prompt_mask=np.ones((1, 2))), "prompt_mask goes with"),
  ],
)
def test_bad_arguments_are_one_sentence(lm, change, message):
  arguments = dict(prompts=PROMPTS, max_new_tokens=2) | change
  with pytest.raises(ValueError, match=message):
    generate(lm, **arguments)

"""Matching: every mixer of the folder at one model's parameters and state."""

import dataclasses

import jax
import pytest
from flax import nnx

from experiments import match_mixers, matching
from trellis_jax import LM, LMConfig, mixers

jax.config.update("jax_numpy_rank_promotion", "raise")

BASE = LMConfig(vocab_size=101, width=48, num_layers=3, num_heads=4)


def test_sizes_are_those_of_the_built_model():
  lm = LM(BASE, rngs=nnx.Rngs(0))
  sizes = matching.sizes(BASE, 64)
  leaves = jax.tree.leaves(lm.init_state(1))
  assert sizes.parameters == sum(x.size for x in jax.tree.leaves(nnx.split(lm)[1]))
  assert (sizes.state_floats, sizes.state_bytes) == (lm.state_size(), sum(x.nbytes for x in leaves))
  assert sizes.flops == lm.flops(64) / 64


@pytest.mark.parametrize("mixer", [*mixers.names(), ("trellis", "attention")], ids=str)
def test_parameters_are_matched(mixer):
  target = matching.sizes(BASE).parameters
  got = matching.match(BASE, mixer=mixer, parameters=target)
  assert abs(matching.sizes(got).parameters - target) <= 0.01 * target
  assert dataclasses.replace(got, mlp_width=0) == dataclasses.replace(BASE, mixer=mixer)


def test_the_width_is_a_multiple_of_eight_where_that_is_close_enough():
  wide = dataclasses.replace(BASE, width=128)
  target = matching.sizes(wide).parameters
  assert matching.match(wide, mixer="attention", parameters=target).mlp_width % 8 == 0
  narrow = LMConfig(vocab_size=11, width=8, num_layers=1, num_heads=2, mlp_width=7)
  narrow = dataclasses.replace(narrow, mixers={"trellis": {"num_slots": 2}})
  assert matching.match(narrow, parameters=matching.sizes(narrow).parameters).mlp_width == 7


@pytest.mark.parametrize("mixer", ["trellis", "attention"])
@pytest.mark.parametrize("slots", [32, 50, 64])
def test_the_state_is_matched_by_a_knob(mixer, slots):
  target = matching.sizes(
    dataclasses.replace(BASE, mixers={"trellis": {"num_slots": slots}})
  ).state_floats
  got = matching.match(BASE, mixer=mixer, state=target)
  assert abs(matching.sizes(got).state_floats - target) <= 0.01 * target
  if mixer == "trellis":
    assert got.mixers["trellis"]["num_slots"] == slots


def test_what_is_out_of_reach_is_one_sentence():
  with pytest.raises(ValueError, match=r"parameters=1,000 are out of reach .* mlp_width=1 has"):
    matching.match(BASE, parameters=1000)
  with pytest.raises(ValueError, match=r"state=7 floats are out of reach .* num_slots=1 has"):
    matching.match(BASE, state=7)


def test_the_command_prints_a_row_for_every_mixer(capsys, monkeypatch):
  some = ["attention", "gla", "trellis", "ttt_linear"]
  monkeypatch.setattr(mixers, "names", lambda: some)
  flags = ["--state", "--config.model.width=64", "--config.data.vocab_size=300"]
  assert match_mixers.main(["", *flags]) == 0
  lines = capsys.readouterr().out.splitlines()
  names = [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:]
  assert names[0] == "trellis" and sorted(names) == some
  count = {
    name: line.split("|")[2].replace(",", "").strip() for name, line in zip(names, lines[2:])
  }
  assert abs(int(count["attention"]) - int(count["trellis"])) <= 0.01 * int(count["trellis"])
  assert match_mixers.main(["", "--config.model.mixer=gls"]) == 2
  assert "mixer='gls' is unknown" in capsys.readouterr().err

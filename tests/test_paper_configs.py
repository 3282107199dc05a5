"""The rows of the paper's tables: sizes as published, one change each, rivals of equal size."""

import dataclasses

import jax
import pytest
from flax import nnx

from experiments import config, matching
from experiments.configs import default
from experiments.configs.paper import base, readings, table2, table4
from experiments.tables import run
from trellis_jax import LM, mixers

jax.config.update("jax_numpy_rank_promotion", "raise")

TABLES = [p.stem for p in run.FOLDER.glob("*.py") if p.stem not in run.NO_TABLE]
# Millions of parameters; the paper's shape of its 170M row gives 119.
PUBLISHED_SIZES = {"125m": (117, 117), "350m": (361, 361), "780m": (767, 786)}
PUBLISHED_SIZES |= {"small": (20, 60), "midi": (20, 60)}


def lm_of(cfg):
  return config.lm_config(cfg.model, cfg.data.vocab_size)


def flat(cfg, at=""):
  for key, value in cfg.items():
    if hasattr(value, "items"):
      yield from flat(value, f"{at}{key}.")
    else:
      yield at + key, value


def changes(one, other):
  """The fields of another value, by dotted name; that of the run's folder is left out."""
  one, other = dict(flat(one)), dict(flat(other))
  return {k: other[k] for k in one if one[k] != other[k] and k != "workdir"}


@pytest.mark.parametrize("scale", base.SCALES)
@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_a_run_that_its_labels_alone_name(name, scale):
  module = run.get(name)
  rows = list(module.rows(scale))
  names = [tuple(map(str, row.labels.values())) for row in rows]
  assert len(set(names)) == len(names) > 1
  assert len({tuple(row.labels) for row in rows}) == 1
  for row in rows:
    config.check(row.config)
    assert len(row.rates) == 3 and row.config.optim.peak_lr == row.rates[1]
    assert row.config.batch_size * row.config.seq_len == base.BATCH_TOKENS[scale]
  named = config.parse(["", f"--config={run.FOLDER / name}.py:{scale},{','.join(names[-1])}"])
  assert named.to_dict() == rows[-1].config.to_dict()
  with pytest.raises(ValueError, match="fits 0 rows; accepted are"):
    module.get_config(f"{scale},none")
  with pytest.raises(ValueError, match="scale 'tiny' is unknown; accepted are paper, small, midi"):
    module.get_config("tiny")
  assert "Table" in module.__doc__ or "Fig" in module.__doc__ or "paper" in module.__doc__
  assert f"python -m experiments.tables.run {name}" in module.__doc__


@pytest.mark.parametrize("size", base.SIZES)
def test_sizes_are_the_papers_and_rivals_have_as_many_parameters(size):
  count = {}
  for mixer in base.NAMES:
    row = base.row({"model": mixer}, size, mixer, 2048)
    count[mixer] = matching.sizes(lm_of(row.config)).parameters
  least, most = PUBLISHED_SIZES.get(size, (0, 2000))
  drawn = base.row({}, size, "trellis", 2048, v_conv=False, alpha_conv=False)  # the paper's Fig. 1
  assert least <= round(matching.sizes(lm_of(drawn.config)).parameters / 1e6) <= most
  for mixer, parameters in count.items():
    assert parameters == pytest.approx(count["trellis"], rel=0.01), mixer


@pytest.mark.parametrize("scale", ["small", "midi", "mini"])
def test_state_matched_rows_have_the_parameters_of_their_rivals(scale):
  rows = {tuple(r.labels.values()): r.config for r in table4.rows(scale)}
  count = {m: matching.sizes(lm_of(rows[m, 512])).parameters for m in ("trellis", *table4.MATCHED)}
  for parameters in count.values():
    assert parameters == pytest.approx(count["trellis"], rel=0.005)


def memory_floats(cfg):
  """What one layer's memories hold, without what only speed needs."""
  lm = lm_of(cfg)
  mixer = nnx.eval_shape(lambda: LM(dataclasses.replace(lm, num_layers=1), rngs=nnx.Rngs(0)))
  mixer = mixer.blocks()[0][1].mixer
  if lm.mixer == ("trellis",):
    return mixer.num_heads * mixer.config.num_slots * (mixer.head_dim + mixer.value_dim)
  return mixer.num_heads * mixer.head_dim * mixer.value_dim


@pytest.mark.parametrize("scale", ["small", "midi", "mini"])
def test_wide_rows_have_the_state_and_the_widths_of_gated_delta_net(scale):
  rows = {tuple(r.labels.values()): r.config for r in table4.rows(scale)}
  wide, rival = rows["trellis_wide", 512], rows["gated_delta_net", 512]
  assert memory_floats(wide) == memory_floats(rival)
  lm = lm_of(rival)
  mixer = nnx.eval_shape(lambda: LM(lm, rngs=nnx.Rngs(0))).blocks()[0][1].mixer
  knobs = wide.model.trellis
  assert (knobs.head_dim, knobs.value_dim) == (mixer.head_dim, mixer.value_dim)


@pytest.mark.parametrize("size", ["125m", "350m", "mini"])
def test_half_the_slots_have_the_state_of_delta_net_and_ttt(size):
  matched = memory_floats(base.row({}, size, "trellis", 2048, num_slots=32).config)
  for mixer in ("delta_net", "ttt_linear", "linear_attention"):
    assert memory_floats(base.row({}, size, mixer, 2048).config) == matched


@pytest.mark.parametrize("scale", base.SCALES)
def test_an_ablation_changes_what_its_label_says_and_nothing_else(scale):
  rows = {row.labels["row"]: row.config for row in table2.rows(scale)}
  one = {
    "no_forget": {"forget": False},
    "f_l2_silu": {"f": "l2_silu"},
    "f_softmax": {"f": "softmax"},
    "linear_phi_f_softmax": {"phi": "identity", "f": "softmax"},
    "linear_phi_f_ln_silu": {"phi": "identity"},
    "slots_32": {"num_slots": 32},
    "slots_128": {"num_slots": 128},
    "exact": {"chunk_size": 1},
    "read_ln_silu": {"phi_out": "ln_silu"},
    "stale_16": {"chunk_size": 16, "curvature": 0.0},
    "stale_64": {"curvature": 0.0},
    "stale_64_half": {"curvature": 0.0, "step_init": 0.5},
  }
  plain = {name for name in rows if name.startswith("plain_")}
  assert set(one) | {"delta_net", "ttt_linear", "trellis", "literal"} | plain == set(rows)
  ours = {"read_ln_silu", "stale_16", "stale_64", "stale_64_half", "literal"} | plain
  assert set(table2.PUBLISHED) == set(rows) - ours
  for name in plain:
    want = rows[name.removeprefix("plain_")].model.trellis.to_dict() | default.PLAIN
    assert rows[name].model.trellis.to_dict() == want
  for name, knobs in one.items():
    want = {f"model.trellis.{k}": v for k, v in knobs.items()}
    assert changes(rows["trellis"], rows[name]) == want
  for name in ("delta_net", "ttt_linear"):
    found = changes(rows["trellis"], rows[name])
    assert set(found) == {"model.mixer", "model.mlp_width"}


def test_the_literal_reading_is_the_librarys_and_each_choice_stands_alone():
  rows = {row.labels["row"]: row.config for row in readings.rows("mini")}
  literal = mixers.get("trellis").Config.literal()
  for knob, value in readings.LITERAL.items():
    if knob not in ("f", "phi", "phi_out"):
      assert getattr(literal, knob) == value
  merged = {}
  for name in readings.CHOICES:
    found = changes(rows["default"], rows[name])
    assert len(found) == len(readings.CHOICES[name])
    merged |= found
  assert changes(rows["default"], rows["literal"]) == merged
  assert len(merged) == len(readings.LITERAL) == sum(map(len, readings.CHOICES.values()))
  for name, knobs in readings.TRIED.items():
    want = {f"model.trellis.{knob}": value for knob, value in knobs.items()}
    assert changes(rows["default"], rows[name]) == want


def test_the_lengths_of_table_4_differ_in_rows_alone():
  rows = {tuple(r.labels.values()): r for r in table4.rows("mini")}
  found = changes(rows["trellis", 512].config, rows["trellis", 8192].config)
  assert set(found) == {"seq_len", "batch_size", "model.attention.cache_length"}
  paper = {tuple(r.labels.values()): r for r in table4.rows("paper")}
  assert len(paper) == 70 and paper["trellis", "125m", "books", 32768].published == 17.18
  assert paper["attention", "125m", "books", 32768].published is None
  assert paper["gated_delta_net", "350m", "pile", 2048].published == 8.53
  assert paper["trellis", "125m", "pile", 2048].config.steps == round(2.4e9 / 2**19)

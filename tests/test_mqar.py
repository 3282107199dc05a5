"""Recall as a task: the protocol's layout and law, what does not fit, resumption, training."""

import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import config, data, hooks, main, metrics, tasks
from experiments.errors import UserError
from experiments.tasks import mqar

jax.config.update("jax_numpy_rank_promotion", "raise")

KNOBS = {
  "vocab_size": 64,
  "pairs": 6,
  "blanks": 20,
  "noise": False,
  "power": 0.01,
  "train_examples": 1000,
  "held_out_examples": 100,
  "seed": 0,
}
CONFIG = str(pathlib.Path(config.DEFAULT).with_name("mqar.py"))


def _rows(seq_len=64, split="train", **knobs):
  return mqar.Rows(mqar.Config(**KNOBS | knobs), split, seq_len)


def _example(*args, **kwargs):
  return _rows(*args, **kwargs)[0]


@pytest.mark.parametrize(
  "seq_len, knobs",
  [
    (64, {}),
    (44, {}),  # as many slots as pairs
    (24, {"blanks": 0}),
    (66, {"blanks": 2, "pairs": 16, "vocab_size": 34}),  # as many keys as pairs
    (45, {"blanks": 5, "pairs": 1, "vocab_size": 9}),
    (64, {"noise": True}),
  ],
)
def test_every_example_keeps_to_the_protocol(seq_len, knobs):
  rows = _rows(seq_len, **knobs)
  c = rows.config
  start, end = c.blanks, c.blanks + 2 * c.pairs
  for i in range(50):
    row = rows[i]
    assert {k: (v.dtype.name, v.shape) for k, v in row.items()} == {
      "tokens": ("int32", (seq_len,)),
      "targets": ("int32", (seq_len,)),
      "segment_ids": ("int32", (seq_len,)),
      "weights": ("float32", (seq_len,)),
    }
    tokens, targets = row["tokens"], row["targets"]
    keys, values = tokens[start:end:2], tokens[start + 1 : end : 2]
    assert set(keys) <= set(range(1, c.vocab_size // 2)) and len(set(keys)) == c.pairs
    assert set(values) <= set(range(c.vocab_size // 2, c.vocab_size))
    assert len(set(values)) == c.pairs
    at = np.flatnonzero(row["weights"])
    assert set(row["weights"][at]) == {1.0}
    assert not ((at - end) % 2).any() and at.min() >= end
    assert sorted(tokens[at]) == sorted(keys)
    value_of = dict(zip(keys.tolist(), values.tolist()))
    assert [value_of[token] for token in tokens[at].tolist()] == targets[at].tolist()
    assert not np.delete(targets, at).any()
    assert (row["segment_ids"] == 1).all()
    if not c.noise:
      assert not tokens[:start].any() and not np.delete(tokens[end:], at - end).any()


def test_noise_is_uniform_over_the_vocabulary_and_changes_nothing_else():
  plain, noisy = _rows(), _rows(noise=True)
  counts = np.zeros(64)
  for i in range(400):
    a, b = plain[i], noisy[i]
    kept = a["tokens"] != 0
    np.testing.assert_array_equal(b["tokens"][kept], a["tokens"][kept])
    np.testing.assert_array_equal(b["weights"], a["weights"])
    np.testing.assert_array_equal(b["targets"], a["targets"])
    counts += np.bincount(b["tokens"][~kept], minlength=64)
  assert np.abs(counts / counts.mean() - 1).max() < 0.3  # 5 standard deviations


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_slots_follow_the_law_in_the_order_of_the_keys(power):
  rows = _rows(blanks=0, pairs=2, power=power, train_examples=3000)
  slots = rows.seq_len // 2 - 2
  first, second = np.zeros(slots), np.zeros(slots)
  for i in range(3000):
    tokens = rows[i]["tokens"]
    for key, counts in ((tokens[0], first), (tokens[2], second)):
      counts[np.flatnonzero(tokens[4:] == key)[0] // 2] += 1 / 3000
  weights = np.arange(1, slots + 1) ** (power - 1)
  p = weights / weights.sum()
  # The second key's slot is drawn from what the first one's leaves.
  q = np.array(
    [sum(p[i] * p[j] / (1 - p[i]) for i in range(slots) if i != j) for j in range(slots)]
  )
  np.testing.assert_allclose(first, p, atol=0.04)
  np.testing.assert_allclose(second, q, atol=0.04)
  assert (power < 1) == (first[0] - second[0] > 0.05)


def test_a_row_depends_on_seed_split_and_number_alone():
  same = _rows(train_examples=7, held_out_examples=9)[3]
  for key, value in _rows()[3].items():
    np.testing.assert_array_equal(same[key], value)
  others = [_rows()[4], _rows(seed=1)[3], _rows(split="validation")[3], _rows(split="test")[3]]
  tokens = {row["tokens"].tobytes() for row in [same, *others]}
  assert len(tokens) == 5
  assert [len(_rows(split=s)) for s in ("train", "validation", "test")] == [1000, 100, 100]


@pytest.mark.parametrize(
  "seq_len, knobs, words",
  [
    (65, {}, "seq_len=65 leaves an odd 45 tokens after data.mqar.blanks=20; accepted is an even"),
    (64, {"blanks": 19}, "leaves an odd 45 tokens after data.mqar.blanks=19"),
    (
      42,
      {},
      "seq_len=42 is too short for data.mqar.blanks=20 and data.mqar.pairs=6; accepted is at",
    ),
    (8, {}, "accepted is at least 44"),
    (
      64,
      {"vocab_size": 13},
      "data.mqar.vocab_size=13 is too small for data.mqar.pairs=6; accepted",
    ),
    (64, {"vocab_size": -1}, "accepted is at least 14"),
    (64, {"pairs": 0}, "data.mqar.pairs=0; accepted is at least 1"),
    (64, {"blanks": -2}, "data.mqar.blanks=-2; accepted is at least 0"),
    (64, {"seed": -1}, "data.mqar.seed=-1; accepted is at least 0"),
    (64, {"power": 1.5}, "data.mqar.power=1.5; accepted is from 0 to 1"),
    (64, {"power": float("nan")}, "data.mqar.power=nan; accepted is from 0 to 1"),
    (64, {"train_examples": 0}, "data.mqar.train_examples=0; accepted is at least 1"),
    (64, {"held_out_examples": 0}, "data.mqar.held_out_examples=0; accepted is at least 1"),
  ],
)
def test_what_does_not_fit_is_one_sentence(seq_len, knobs, words):
  with pytest.raises(UserError) as e:
    _example(seq_len, **knobs)
  assert words in str(e.value) and "\n" not in str(e.value)


def test_a_task_is_a_file_and_an_unknown_ones_error_lists_the_folder():
  assert "mqar" in tasks.names() and tasks.get("mqar") is mqar
  assert not any(name.endswith("_check") for name in tasks.names())
  with pytest.raises(UserError, match=r"data.task='sort' is unknown; accepted are '' .*mqar"):
    tasks.get("sort")


def _loader(split="train", **kwargs):
  dataset = data.load(config.parse(["", f"--config={CONFIG}"]).data)
  return data.loader(getattr(dataset, split), seq_len=64, batch_size=4, **kwargs)


def test_the_loader_resumes_exactly_from_one_integer():
  iterator = _loader(seed=3)
  batches = [next(iterator) for _ in range(5)]
  state = json.loads(json.dumps(iterator.get_state()))
  assert state == {"next_index": 5}
  after, again = [next(iterator) for _ in range(3)], _loader(seed=3)
  again.set_state(state)
  for want in after:
    got = next(again)
    assert got.keys() == want.keys()
    for key in want:
      np.testing.assert_array_equal(got[key], want[key])
  seen = {row.tobytes() for batch in batches + after for row in batch["tokens"]}
  assert len(seen) == 32
  assert next(_loader(seed=4))["tokens"].tobytes() != batches[0]["tokens"].tobytes()


def test_held_out_rows_end_with_padding_that_does_not_count():
  dataset = data.load(config.parse(["", f"--config={CONFIG}"]).data)
  small = tasks.TaskDataset("mqar", mqar.Config(**KNOBS | {"held_out_examples": 6}))
  assert (dataset.vocab_size, small.vocab_size) == (64, 64)
  batches = list(
    data.loader(small.validation, seq_len=64, batch_size=4, shuffle=False, repeat=False)
  )
  weights = np.concatenate([batch["weights"] for batch in batches]).sum(1)
  assert weights.tolist() == [6] * 6 + [0] * 2
  assert not batches[-1]["segment_ids"][2:].any()


def test_a_run_that_was_stopped_goes_on_exactly_and_has_no_bytes(tmp_path, monkeypatch, capsys):
  sizes = ["model.width=16", "model.mlp_width=16", "batch_size=4", "eval.batches=2"]
  times = ["steps=4", "optim.warmup_steps=2", "eval.every=2", "log.every=1", "checkpoint.every=4"]
  flags = [f"--config.{flag}" for flag in sizes + times]

  def run(folder, *more):
    workdir = tmp_path / folder
    argv = ["main", f"--config={CONFIG}:linear", *flags, *more, f"--config.workdir={workdir}"]
    code = main.main(argv)
    timeless = lambda r: {k: v for k, v in r.items() if not k.startswith("time/")}
    return code, [timeless(r) for r in metrics.read(workdir / metrics.JSONL)]

  code, whole = run("whole")
  assert code == 0
  assert [r["step"] for r in whole if "eval/accuracy" in r] == [2, 4]
  assert not any("eval/bits_per_byte" in r for r in whole)
  assert [r["train/tokens"] for r in whole] == [24] * 4  # queries
  with monkeypatch.context() as patch:
    patch.setattr(hooks.StopRequest, "requested", lambda _, step: step == 3)
    assert run("halves") == (0, whole[:3])
  assert run("halves") == (0, whole)
  assert "going on from step 3" in capsys.readouterr().out
  assert run("halves", "--config.steps=5", "--config.data.mqar.seed=1") == (2, whole)
  assert "data.mqar.seed = 0 (here 1)" in capsys.readouterr().err


def test_the_linear_reading_is_an_argument_of_the_config(capsys):
  linear = config.parse(["", f"--config={CONFIG}:linear"])
  default = config.parse(["", f"--config={CONFIG}"])
  knobs = linear.model.trellis
  assert (knobs.phi, knobs.target, knobs.chunk_size) == ("identity", "layer_norm", 1)
  assert default.model.trellis.phi != "identity"
  assert main.main(["main", f"--config={CONFIG}:other"]) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
  assert "reading 'other' is unknown; accepted are none or linear" in err


@pytest.mark.parametrize(
  "flag, words",
  [
    ("data.task=sort", "data.task='sort' is unknown"),
    ("data.mqar.pairs=7", "seq_len=44 is too short"),
    ("data.mqar.blanks=19", "leaves an odd 25 tokens"),
    ("data.mqar.vocab_size=4", "data.mqar.vocab_size=4 is too small"),
  ],
)
def test_the_command_refuses_before_anything_is_written(flag, words, tmp_path, capsys):
  argv = ["main", f"--config={CONFIG}", "--config.seq_len=44", f"--config.{flag}"]
  assert main.main([*argv, f"--config.workdir={tmp_path / 'run'}"]) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and err.count("\n") == 1 and words in err
  assert not (tmp_path / "run").exists()


def test_commands_on_text_refuse_a_task():
  cfg = config.parse(["", f"--config={CONFIG}"])
  with pytest.raises(UserError, match=r"data.task='mqar' has no text"):
    data.main(cfg)

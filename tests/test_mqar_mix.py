"""Recall at several settings: what a mix's rows hold, and the accuracy of each setting."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import config, data, main, metrics, study, tasks
from experiments.errors import UserError
from experiments.evals import mqar as recall
from experiments.tasks import mqar, mqar_check, mqar_mix

jax.config.update("jax_numpy_rank_promotion", "raise")

KNOBS = {
  "vocab_size": 64,
  "settings": "16x2*30, 24x4*20,48x8*5",
  "blanks": 0,
  "noise": False,
  "power": 0.01,
  "held_out_examples": 5,
  "seed": 0,
}
CONFIG = str(pathlib.Path(config.DEFAULT).with_name("mqar.py"))


def _rows(split="train", seq_len=50, **knobs):
  return mqar_mix.Rows(mqar_mix.Config(**KNOBS | knobs), split, seq_len)


@pytest.mark.parametrize("split, counts", [("train", (30, 20, 5)), ("test", (5, 5, 5))])
@pytest.mark.parametrize("noise", [False, True])
def test_rows_hold_every_example_once_each_in_a_segment_of_its_own(split, counts, noise):
  rows = _rows(split, noise=noise)
  found = {length: [] for length in (16, 24, 48)}
  for i in range(len(rows)):
    row = rows[i]
    ids = row["segment_ids"]
    sizes = np.bincount(ids)[1:]
    assert len(set(sizes)) == 1 and (np.diff(ids[: sizes.sum()]) >= 0).all()
    assert not row["weights"][sizes.sum() :].any() and not ids[sizes.sum() :].any()
    for start in range(0, sizes.sum(), sizes[0]):
      at = slice(start, start + sizes[0])
      found[sizes[0]].append({k: v[at] for k, v in row.items()})
  for (length, examples), count, pairs in zip(found.items(), counts, (2, 4, 8)):
    assert len(examples) == count
    labels = np.stack([mqar_check.labels_of(e) for e in examples])
    tokens = np.stack([e["tokens"] for e in examples])
    mqar_check.check(tokens, labels, vocab_size=64, pairs=pairs, noise=noise)
    assert length == tokens.shape[1]


def test_settings_take_turns_in_proportion():
  rows = _rows(settings="16x2*300,48x8*100", seq_len=48)
  first = [rows[i]["segment_ids"].max() for i in range(len(rows))]
  assert len(first) == 200
  for start in range(0, 200, 20):
    assert first[start : start + 20].count(3) == 10


def test_settings_of_the_same_pairs_have_examples_of_their_own():
  rows = _rows(settings="16x2*4,24x2*4", seq_len=24)
  pairs = {rows[i]["tokens"][:4].tobytes() for i in range(len(rows))}
  assert len(pairs) == 8


@pytest.mark.parametrize(
  "knobs, words",
  [
    ({"settings": "64x4*10"}, "seq_len=50 is too short for examples of 64 tokens"),
    ({"settings": "16x5"}, "seq_len=16 is too short for data.mqar.blanks=0"),
    ({"settings": "17x2"}, "leaves an odd 17 tokens"),
    ({"settings": "16:2"}, "setting '16:2'; accepted is LENGTHxPAIRS*EXAMPLES"),
    ({"settings": ""}, "setting ''; accepted is LENGTHxPAIRS*EXAMPLES"),
    ({"settings": "16x0*3"}, "data.mqar.pairs=0; accepted is at least 1"),
    ({"seed": -1}, "data.mqar_mix.seed=-1; accepted is from 0"),
    ({"held_out_examples": 0}, "held_out_examples=0; accepted is at least 1"),
  ],
)
def test_what_does_not_fit_is_one_sentence(knobs, words):
  with pytest.raises(UserError) as e:
    _rows(**knobs)
  assert words in str(e.value) and "\n" not in str(e.value)


class Oracle(nnx.Module):
  """Answers with the token that came after the earlier one of the same kind, when it may."""

  def __init__(self, vocab: int, knows: float):
    self.vocab, self.knows = vocab, nnx.Param(jnp.float32(knows))

  def hidden(self, tokens, segment_ids):
    same = (tokens[:, :, None] == tokens[:, None, :]) & (tokens[:, :, None] > 0)
    earlier = same & jnp.tri(tokens.shape[1], k=-1, dtype=bool)[None]
    after = jnp.take_along_axis(tokens, jnp.argmax(earlier, -1) + 1, axis=1)
    return self.knows[...] * jax.nn.one_hot(after, self.vocab), None

  def head_kernel(self):
    return jnp.eye(self.vocab)


def test_accuracy_is_the_share_of_right_answers_whatever_the_batches():
  task = mqar.Config(64, 2, 0, False, 0.01, 1, 9, 0)
  settings = [
    recall.Setting(16, task),
    recall.Setting(40, mqar.Config(64, 8, 4, False, 1, 1, 5, 0)),
  ]
  for tokens in (1, 64, 10_000):
    for knows in (1.0, 0.0):
      graphdef, params = nnx.split(Oracle(64, knows), nnx.Param)
      found = dict(recall.Evaluator(graphdef, settings, tokens).run(params))
      # Who knows nothing says 0, which is nobody's value.
      assert found == {"accuracy/16x2": knows, "accuracy/40x8": knows}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The flags of a short run on a mix, and its last evaluation."""
  workdir = tmp_path_factory.mktemp("run")
  fields = f"""
    steps=4 batch_size=4 seq_len=48 data.task=mqar_mix data.mqar_mix.vocab_size=64
    data.mqar_mix.settings=16x2*99,48x8*40 data.mqar_mix.held_out_examples=12 eval.batches=99
    model.width=16 model.mlp_width=16 model.num_layers=1 model.mixer=linear_attention
    optim.warmup_steps=2 eval.every=4 checkpoint.every=4 workdir={workdir}
  """
  flags = [f"--config={CONFIG}", *(f"--config.{field}" for field in fields.split())]
  assert main.main(["main", *flags]) == 0
  return flags, workdir, metrics.read(workdir / metrics.JSONL)[-1]


def test_the_command_tells_the_settings_of_a_run_apart(run, capsys):
  flags, workdir, _ = run
  capsys.readouterr()
  assert recall.main(["mqar", *flags]) == 0
  report = json.loads((workdir / "mqar.json").read_text())
  rows = report["settings"]
  assert [(r["seq_len"], r["pairs"], r["examples"]) for r in rows] == [(16, 2, 12), (48, 8, 12)]
  assert report["step"] == 4 and report["floats_of_state"] > 0
  assert "accuracy" in capsys.readouterr().out
  assert recall.main(["mqar", *flags, "--settings=52x4,20x1", "--examples=7", "--blanks=4"]) == 0
  rows = json.loads((workdir / "mqar.json").read_text())["settings"]
  assert [(r["seq_len"], r["pairs"]) for r in rows] == [(52, 4), (20, 1)]
  assert {(r["examples"], r["blanks"], r["noise"]) for r in rows} == {(7, 4, True)}


def test_pooled_over_the_settings_it_is_the_trainers_accuracy(run):
  """On the same split: the queries are those of the mix's own rows."""
  flags, _, record = run
  cfg = config.parse(["", *flags])
  job, params = recall.runs.open_run(cfg)
  (batch,) = data.loader(
    tasks.load(cfg.data).validation, seq_len=48, batch_size=16, shuffle=False, repeat=False
  )
  lm = recall.runs.model(job, params)
  logits, _ = nnx.jit(lambda lm, t, s: lm(t, segment_ids=s))(
    lm, batch["tokens"], batch["segment_ids"]
  )
  counted = batch["weights"] > 0
  right = (np.asarray(logits).argmax(-1) == batch["targets"])[counted].sum()
  asked = counted.sum()
  assert asked == 12 * 2 + 12 * 8
  assert record["eval/accuracy"] == pytest.approx(right / asked)


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--config.data.task="], "config.data.task = '' is given; accepted are mqar, mqar_mix"),
    (["--settings=64"], "setting '64'; accepted is LENGTHxPAIRS"),
    (["--settings=16x9"], "seq_len=16 is too short"),
    (["--examples=few"], "--examples=few is given, but it must be an integer >= 0"),
    (["--blanks=-1"], "--blanks=-1 is given, but it must be an integer >= 0"),
    (["--noise=1"], "--noise=1 is given; accepted are true, false"),
    (["--config.workdir={none}"], "holds no checkpoint"),
    (["--config.data.mqar_mix.seed=1"], "data.mqar_mix.seed = 0 (here 1)"),
  ],
)
def test_the_commands_mistakes_are_one_sentence(run, flags, words, tmp_path, capsys):
  given = [flag.format(none=tmp_path / "none") for flag in flags]
  assert recall.main(["mqar", *run[0], *given]) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_a_study_does_not_depend_on_the_knobs_of_other_tasks():
  cfg = config.parse(["", f"--config={CONFIG}"])
  found = study.settings(cfg)["data"]
  assert "mqar" in found and not set(tasks.names()) & set(found) - {"mqar"}
  changed = config.parse(["", f"--config={CONFIG}", "--config.data.mqar_mix.seed=3"])
  assert study.settings(changed)["data"] == found


def test_the_recorded_study_is_of_todays_settings():
  """No line of a committed study is made stale by a new task's knobs."""
  module = study.get("mqar_mixers")
  lines = metrics.read(study.RESULTS / "mqar_mixers.jsonl")
  cells = {json.dumps(labels): study.settings(cfg)["data"] for labels, cfg in module.cells()}
  for line in lines:
    assert line["settings"]["data"] == cells[json.dumps(line["labels"])]


def test_a_mix_goes_through_the_loader():
  split = tasks.TaskDataset("mqar_mix", mqar_mix.Config(**KNOBS)).train
  batch = next(data.loader(split, seq_len=50, batch_size=4, seed=1))
  assert batch["tokens"].shape == (4, 50) and batch["weights"].sum() > 0

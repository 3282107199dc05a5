"""The report, end to end on a tiny run: its numbers, its files, and what it refuses."""

import contextlib
import io
import json
import math
import shutil

import jax
import matplotlib.image
import numpy as np
import pytest
from flax import nnx

from experiments import checkpoint, config, main, metrics, plots, report, train
from experiments import mesh as mesh_lib
from experiments.evals import baselines, ngram
from trellis_jax import inspect

jax.config.update("jax_numpy_rank_promotion", "raise")

STEPS, SEQ_LEN = 4, 48
FLAGS = f"""
  steps={STEPS} batch_size=4 seq_len={SEQ_LEN} data.tokenizer=byte optim.warmup_steps=2
  model.width=16 model.num_layers=2 model.num_heads=2 model.mlp_width=32 model.trellis.num_slots=8
  model.trellis.chunk_size=8 checkpoint.every=2 eval.every=2 eval.batches=2 log.every=1
  log.tensorboard=False
""".split()
FIGURES = ["loss", "perplexity_by_position", "inner_loss", "gates", "memories"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with a corpus of 30 documents and a run of four steps on it, "trained"."""
  home = tmp_path_factory.mktemp("home")
  (home / "corpus").mkdir()
  rng = np.random.default_rng(0)
  for i in range(30):
    words = rng.choice(["tree", "vine", "leaf", "größe", "\n"], 60)
    (home / "corpus" / f"{i}.txt").write_text(" ".join(words), encoding="utf-8")
  assert main.main(argv(home, home / "trained")) == 0
  return home


@pytest.fixture(scope="module")
def reported(home):
  """What a report of "trained" prints, and its report.json."""
  return run(argv(home, home / "trained"))[1], read(home / "trained")


def argv(home, workdir, *flags):
  places = f"workdir={workdir}", f"data.path={home}/corpus", f"data.cache={home}/cache"
  return ["report", *(f"--config.{flag}" for flag in (*FLAGS, *places)), *flags]


def run(args):
  """Exit code, stdout and stderr of a report."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = report.main(args)
  return code, out.getvalue(), err.getvalue()


def read(workdir):
  return json.loads((workdir / "report.json").read_text())


def test_the_numbers_are_those_of_the_trainer_on_the_newest_checkpoint(home, reported):
  """The same parameters as in training's last evaluation, and its own loss over the test split."""
  values = reported[1]
  job = train.prepare(config.parse(argv(home, home / "trained")))
  assert values["step"] == job.start == STEPS
  program = train.build(job)
  params = checkpoint.restore(job.workdir, STEPS, params=program.abstract.params)["params"]
  logged = metrics.read(job.workdir / metrics.JSONL)[-1]
  assert train.evaluate(job, program, params)["eval/loss"] == pytest.approx(logged["eval/loss"])
  sums = [
    program.evaluate(params, mesh_lib.put_batch(batch, job.mesh), program.token_bytes)
    for batch in job.batches("test", shuffle=False, repeat=False)
  ]
  nats, count, size = (sum(float(s[k]) for s in sums) for k in ("nll", "count", "bytes"))
  test = job.dataset.test
  assert values["whole_split"] and values["split"] == "test"
  assert values["tokens"] == count == test.num_tokens - 1
  assert values["bytes"] == size == test.num_bytes
  assert values["nats"] == pytest.approx(nats, rel=1e-5)
  assert values["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
  assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
  assert values["parameters"] == sum(x.size for x in jax.tree.leaves(params))


def test_positions_add_up_to_the_split(reported):
  values = reported[1]
  rows = values["by_position"]
  assert [(r["first"], r["last"]) for r in rows] == [(0, 15), (16, 31), (32, 47)]
  assert sum(r["tokens"] for r in rows) == values["tokens"]
  assert sum(r["nats"] for r in rows) == pytest.approx(values["nats"])
  bigram = sum(r["tokens"] * math.log(r["bigram_perplexity"]) for r in rows) / values["tokens"]
  level = values["baselines"]["token bigram"]["perplexity"]
  assert bigram == pytest.approx(math.log(level), rel=1e-5)


def test_baselines_are_those_of_the_same_bytes(home, reported):
  values = reported[1]
  job = train.prepare(config.parse(argv(home, home / "trained")))
  assert values["baseline_tokens"] == values["tokens"]
  for name, value, unit in ngram.baselines(job.dataset, "test"):
    row = values["baselines"][name]
    key = {"perplexity": "perplexity", "bits/byte": "bits_per_byte"}[unit]
    assert row[key] == pytest.approx(value, rel=1e-5), name
  bigram = values["baselines"]["token bigram"]
  bits = math.log2(bigram["perplexity"]) * values["tokens"] / values["bytes"]
  assert bigram["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_what_is_printed_is_what_is_written(reported):
  out, values = reported
  assert f"{values['perplexity']:,.2f}" in out and f"{values['bits_per_byte']:.3f}" in out
  for name, row in values["baselines"].items():
    assert name in out and f"{row['bits_per_byte']:.3f}" in out
  for row in values["by_position"]:
    assert f"{row['first']}-{row['last']}" in out and f"{row['perplexity']:,.2f}" in out
  assert values["sample"]["prompt"].split("\n")[0] in out
  assert "\x1b" not in out
  assert report.printable("a\tb\n\x1b[2J\x00ß") == "a\tb\n\ufffd[2J\ufffdß"


def test_the_figures_are_images_with_something_in_every_part(home, reported):
  paths = reported[1]["plots"]
  assert sorted(paths) == sorted(f"plots/{name}.png" for name in FIGURES)
  for path in paths:
    pixels = matplotlib.image.imread(home / "trained" / path)[..., :3]
    assert min(pixels.shape[:2]) >= 400
    ink = (pixels < 0.9).any(-1)
    for half in (*np.array_split(ink, 2, 0), *np.array_split(ink, 2, 1)):
      assert half.mean() > 0.003, path
  left = {path.name for path in (home / "trained").rglob("*partial*")}
  assert not left


def test_a_second_report_says_the_same_and_computes_no_baseline(home, reported, monkeypatch):
  monkeypatch.setattr(ngram, "witten_bell", None)
  code, _, _ = run(argv(home, home / "trained"))
  again, first = read(home / "trained"), reported[1]
  assert code == 0
  assert {**again, "seconds": 0} == {**first, "seconds": 0}


def test_kept_baselines_that_are_broken_are_computed_again(home, reported):
  (path,) = (home / "cache").rglob("baselines-*.npz")
  whole = path.read_bytes()
  path.write_bytes(whole[:100])
  job = train.prepare(config.parse(argv(home, home / "trained")))
  base = baselines.load(job.dataset, "test", job.dataset.test.num_tokens - 1)
  assert base.rows() == reported[1]["baselines"]
  assert len(path.read_bytes()) == len(whole)


def test_max_tokens_evaluates_the_beginning(home, reported):
  shutil.copytree(home / "trained", home / "part")
  code, out, _ = run(argv(home, home / "part", f"--max_tokens={4 * SEQ_LEN}"))
  values = read(home / "part")
  assert code == 0 and "the first" in out
  assert not values["whole_split"]
  assert values["tokens"] == values["baseline_tokens"] == 4 * SEQ_LEN < reported[1]["tokens"]
  assert sum(r["tokens"] for r in values["by_position"]) == 4 * SEQ_LEN


def test_a_run_without_memories_and_metrics_has_the_other_figures(home, reported, monkeypatch):
  shutil.copytree(home / "trained", home / "bare")
  shutil.rmtree(home / "bare" / "plots")
  (home / "bare" / "metrics.jsonl").unlink()
  monkeypatch.setattr(inspect, "trace_lm", lambda *_, **__: [{}, {}])
  job, params = report.open_run(config.parse(argv(home, home / "bare")))
  lm = nnx.merge(nnx.split(job.lm, nnx.Param)[0], params)
  written = report.draw(job, lm, reported[1])
  assert written == list((home / "bare" / "plots").iterdir())
  assert [path.stem for path in written] == ["perplexity_by_position"]


def test_the_trace_reads_the_longest_document_first(home, reported):
  job, params = report.open_run(config.parse(argv(home, home / "trained")))
  layers, live = report.trace(job, nnx.merge(nnx.split(job.lm, nnx.Param)[0], params))
  assert list(layers) == [1, 2]
  assert live[0].all() and live.shape[1] <= SEQ_LEN
  layer, head = plots.most_used(layers)
  ranks = [t["rank_k"][0, -1, h] * t["rank_v"][0, -1, h] for t in layers.values() for h in (0, 1)]
  assert 2 * (layer - 1) + head - 1 == int(np.argmax(ranks))


def test_a_report_leaves_a_checkpoint_that_is_being_written(home, reported):
  folder = home / "trained" / "checkpoints" / "9.orbax-checkpoint-tmp"
  folder.mkdir()
  try:
    report.open_run(config.parse(argv(home, home / "trained")))
    assert folder.is_dir()
  finally:
    folder.rmdir()


@pytest.mark.parametrize(("length", "count"), [(1, 1), (2, 30), (33, 3)])
def test_figures_of_any_size(length, count, tmp_path):
  rng = np.random.default_rng(0)
  per_token = (
    "forget_gate",
    "step_size",
    *(f"loss_{a}_{w}" for a in ("before", "after") for w in "kv"),
  )
  trace = {name: rng.random((2, length, 3)) for name in per_token}
  trace |= {name: rng.random((2, length, 3)) for name in ("norm_k", "norm_v", "rank_k", "rank_v")}
  trace |= {f"memory_{w}": rng.normal(size=(2, length, 3, 4, 5)) for w in "kv"}
  live = np.arange(length)[None] < np.array([[length], [1]])
  layers = dict.fromkeys(range(1, count + 1), trace)
  records = [{"step": i, "train/loss": 1 / i} for i in range(1, 2 * length)]
  with plots.style():
    for figure in (
      plots.inner_loss(layers, live),
      plots.gates(layers, live),
      plots.memories(trace, 1, 3),
      plots.loss(records, {}),
      plots.perplexity_by_position([(0, 0), (1, 1)], [3.0, math.nan], [4.0, math.nan], 4.0),
    ):
      plots.save(figure, tmp_path / "figure.png")
      assert np.ptp(matplotlib.image.imread(tmp_path / "figure.png")) == 1


def test_averages():
  np.testing.assert_allclose(plots.moving_average(np.arange(5.0), 3), [0.5, 1, 2, 3, 3.5])
  live = np.array([[True, True], [True, False]])
  values = np.array([[[1.0, 3.0], [5.0, 7.0]], [[9.0, 11.0], [100.0, 100.0]]])
  np.testing.assert_allclose(plots.masked_mean(values, live), [6, 6])
  at, masks = plots.log_bins(live)
  np.testing.assert_allclose(at, [1, 2])
  np.testing.assert_allclose(plots.binned(values, masks), [6, 6])


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    (["--config.workdir={home}/none"], "none holds no checkpoint; `python -m experiments.main`"),
    (["--config.model.width=32"], "another run, with model.width = 16 (here 32)"),
    (["--config.model.trellis.num_slots=4"], "model.trellis.num_slots = 8 (here 4)"),
    (["--config.workdir={home}/broken"], "checkpoints/4 cannot be read"),
    (["--config.model.widht=32"], "did you mean config.model.width?"),
    (["--config.data.path={home}/nowhere"], "nowhere' does not exist"),
    (["--config.distributed.enabled=True"], "an evaluation is one process"),
    (["--config.data.task=mqar"], "config.data.task = 'mqar' is given, but a report is on text"),
    (["--config.mesh.data=3"], "whose product must be the 1 devices here"),
    (["--max_tokens=many"], "--max_tokens=many is given, but it must be an integer >= 0"),
    (["--max_tokens"], "--max_tokens= is given, but it must be an integer >= 0"),
    (["--frobnicate"], "unknown"),
  ],
)
def test_mistakes_are_one_sentence(home, flags, sentence):
  broken = home / "broken"
  if not broken.exists():
    shutil.copytree(home / "trained" / "checkpoints", broken / "checkpoints")
    shutil.rmtree(broken / "checkpoints" / str(STEPS) / "params")
  given = [flag.format(home=home) for flag in flags]
  code, out, err = run(argv(home, home / "trained", *given))
  assert (code, out) == (2, "")
  assert err.startswith("error: ") and err.count("\n") == 1
  assert sentence.lower() in err.lower()
  assert not (home / "none").exists()
  assert not (broken / "report.json").exists()

"""The runner of the tables' rows: what is run, what is not run again, what a line says."""

import argparse
import json
import re

import jax
import numpy as np
import pytest

from experiments.configs.paper import base
from experiments.evals import runs
from experiments.tables import lines as lines_lib
from experiments.tables import run, together

jax.config.update("jax_numpy_rank_promotion", "raise")


def line(seed, rate, loss, **more):
  scores = {"nats": loss * 10, "tokens": 10, "perplexity": loss}
  found = dict.fromkeys(lines_lib.FIELDS, "")
  return found | {"seed": seed, "peak_lr": rate, "validation": scores, "test": scores} | more


class Rows:
  """Two rows of tiny models."""

  @staticmethod
  def rows(scale):
    for model in ("trellis", "linear_attention"):
      row = base.row(dict(model=model, context=32), "mini", model, 32)
      cfg = row.config
      cfg.batch_size, cfg.steps, cfg.optim.warmup_steps = 1, 2, 1
      cfg.data.tokenizer = "byte"
      cfg.model.update(width=16, mlp_width=16, num_layers=1, num_heads=1)
      cfg.model.trellis.update(num_slots=4, chunk_size=4)
      cfg.log.every, cfg.eval.every, cfg.eval.batches = 1, 2, 1
      yield row


@pytest.fixture
def text(tmp_path):
  rng = np.random.default_rng(0)
  for split in ("train", "val", "test"):
    (tmp_path / "text" / split).mkdir(parents=True)
    words = " ".join(rng.choice(["tree", "größe", "a"], 60))
    (tmp_path / "text" / split / "one.txt").write_text(words, encoding="utf-8")
  return tmp_path / "text"


def command(text, *more):
  home = text.parent
  return ["run", "rows", f"--data={text}", f"--results={home}", f"--workdir={home}/runs", *more]


def test_rows_run_once_and_a_line_says_where_its_numbers_are_from(
  text, monkeypatch, tmp_path, capsys
):
  monkeypatch.setattr(run, "get", lambda name: Rows)
  monkeypatch.chdir(tmp_path)  # where the tokens are kept
  argv = command(text, "--only=model=trellis", "--rates=1")
  assert run.main(argv) == 0
  lines = lines_lib.read(tmp_path / "rows.jsonl", lines_lib.FIELDS)
  assert [x["seed"] for x in lines] == [0]
  one = lines[0]
  assert one["labels"] == {"model": "trellis", "context": 32} and one["tokens"] == 64
  assert one["test"]["tokens"] == sum(p["tokens"] for p in one["test"]["by_position"]) > 100
  assert one["test"]["bits_per_byte"] > 1 and one["parameters"] > 1000 and one["flops"] > 0
  assert one["command"] == (
    "python -m experiments.tables.run rows --scale=mini --only=model=trellis --only=context=32 "
    "--seeds=0 --data=text --rates=1"
  )
  assert str(tmp_path) not in (tmp_path / "rows.jsonl").read_text()
  monkeypatch.setattr(run, "_train_and_score", None)  # would fail if anything were run again
  assert run.main(argv) == 0
  (text / "test" / "one.txt").write_text("another text " * 20)
  with pytest.raises(TypeError):  # another text is another row
    run.main(argv)
  assert "eta of all 0:00" in capsys.readouterr().out


def test_a_row_on_needles_is_of_their_haystack(text, monkeypatch, tmp_path, capsys):
  class Needles:
    @staticmethod
    def rows(scale):
      row = next(Rows.rows(scale))
      row.config.seq_len, row.config.data.task = 512, "niah"
      row.config.data.niah.update(kinds="niah_single_2", min_length=32, grow_examples=1)
      yield row

  monkeypatch.setattr(run, "get", lambda name: Needles)
  monkeypatch.chdir(tmp_path)
  argv = command(text, "--rates=1", f"--tasks={text}", "--score_tokens=1024")
  assert run.main(argv) == 2
  assert "at mini rows is trained on needles, whose haystack --tasks" in capsys.readouterr().err
  argv = [arg for arg in argv if not arg.startswith("--data")]
  assert run.main(argv) == 0
  (one,) = lines_lib.read(tmp_path / "rows.jsonl", lines_lib.FIELDS)
  assert (one["corpus"], one["tokenizer"]) == ("text", "byte")
  assert one["settings"]["data"]["task"] == "niah"
  assert "haystack" not in one["settings"]["data"]["niah"]
  assert str(tmp_path) not in (tmp_path / "rows.jsonl").read_text()
  # Answers of 7 digits with " " and "." and the end, which has no byte, in two rows of 512.
  assert one["test"]["tokens"] % 10 == 0 and 20 <= one["test"]["tokens"] <= 60
  assert one["test"]["bytes"] == 0.9 * one["test"]["tokens"]
  monkeypatch.setattr(run, "_train_and_score", None)
  assert run.main(argv) == 0
  args = run._parse([*argv, "--tokens=4096"])
  (longer,) = run.chosen(Needles, args)  # eight steps for two
  assert (longer.config.steps, longer.config.data.niah.grow_examples) == (8, 4)


def test_runs_of_a_row_in_one_program_are_what_they_are_alone(text, monkeypatch, tmp_path):
  monkeypatch.setattr(run, "get", lambda name: Rows)
  monkeypatch.chdir(tmp_path)
  found = {}
  for name, flags in (("alone", []), ("together", ["--together"])):
    home = tmp_path / name
    argv = command(text, "--only=model=trellis", "--seeds=0,1,2", *flags)
    assert run.main([*argv, f"--results={home}"]) == 0
    lines = lines_lib.read(home / "rows.jsonl", lines_lib.FIELDS)
    found[name] = {(x["seed"], x["peak_lr"]): x for x in lines}
  alone, together = found["alone"], found["together"]
  assert alone.keys() == together.keys() and len(alone) == 5  # three rates, two further seeds
  differ = {"revision", "machine", "command", "seconds"}
  for key, want in alone.items():
    got = together[key]
    assert got.keys() == want.keys() and got["seconds"] is None
    assert got["command"] == want["command"] + " --together"
    for name in want.keys() - differ - set(lines_lib.SPLITS):
      assert got[name] == want[name], name
    for split in lines_lib.SPLITS:
      assert got[split]["tokens"] == want[split]["tokens"]
      np.testing.assert_allclose(got[split]["nats"], want[split]["nats"], rtol=2e-5)
  losses = [x["test"]["nats"] for x in alone.values()]
  assert min(np.diff(sorted(losses))) > 1e-3  # so that one run is not taken for another
  assert not (tmp_path / "runs" / "unsaved").exists()


def test_the_best_rate_is_that_of_the_mean_over_the_seeds_that_tried_them_all():
  key = {"labels": {}}
  lines = [line(0, 0.1, 3.0, **key), line(0, 0.2, 2.9, **key), line(2, 0.1, 1.0, **key)]
  assert lines_lib.best_rate(lines) == 0.2 and lines_lib.best_rate(lines, least=3) is None
  lines += [line(1, 0.1, 3.0, **key), line(1, 0.2, 3.2, **key)]
  assert lines_lib.best_rate(lines) == 0.1
  assert lines_lib.best_rate([]) is None


def test_what_starts_together_is_a_rows_seeds_that_miss_the_same_rates():
  row, other = Rows.rows("mini")
  todo = [(row, 0, 0.1), (row, 0, 0.2), (other, 0, 0.1), (row, 1, None), (row, 2, 0.1)]
  assert together.first(todo) == [(0, 0.1), (0, 0.2)]
  assert together.first([*todo, (row, 3, 0.1), (row, 3, 0.2)])[2:] == [(3, 0.1), (3, 0.2)]
  assert together.first(todo[4:]) == [(2, 0.1)]


def test_a_run_that_is_lost_beside_others_says_where(text, monkeypatch, tmp_path):
  monkeypatch.setattr(run, "get", lambda name: Rows)
  monkeypatch.setattr(base.Size, "rates", property(lambda size: (1e-3, 1e30, 1e-2)))
  monkeypatch.chdir(tmp_path)
  assert run.main(command(text, "--only=model=trellis", "--together")) == 0
  lines = lines_lib.read(tmp_path / "rows.jsonl", lines_lib.FIELDS)
  slow, fast, lost = sorted(lines, key=lambda x: x["peak_lr"])
  assert re.fullmatch(r"(loss|grad_norm) is (nan|inf) at step 2", lost["failure"])
  assert lost["validation"] is lost["test"] is None
  assert slow["failure"] == fast["failure"] == "" and slow["test"]["nats"] > 0


def test_further_seeds_run_at_the_rate_that_was_best_and_stale_lines_go(tmp_path, monkeypatch):
  args = argparse.Namespace(seeds=[0, 1], rates="3", scale="mini", score_tokens=0)
  row, _ = Rows.rows("mini")
  monkeypatch.setattr(run, "identity", lambda row, args: {"labels": row.labels})
  key = {"labels": row.labels}
  jobs = lambda lines: [(s, r) for _, s, r in run.pending([row], args, lines)]
  slow, middle, fast = row.rates
  assert jobs([]) == [(0, slow), (0, middle), (0, fast), (1, None)]
  swept = [line(0, slow, 3.0, **key), line(0, middle, 2.0, **key)]
  assert jobs(swept) == [(0, fast), (1, None)]
  swept.append(line(0, fast, 0, **key, failure="loss is nan"))
  assert jobs(swept) == [(1, middle)]
  assert jobs([*swept, line(1, middle, 2.5, **key)]) == []
  args.rates = "all"
  assert jobs(swept) == [(1, slow), (1, middle), (1, fast)]
  args.rates = "1"  # known from the start
  assert jobs([]) == [(0, middle), (1, middle)]
  assert [x["seed"] for x in lines_lib.best([*swept, line(1, middle, 9.0, **key)])] == [0, 1]
  old = line(0, slow, 3.0, **key, settings=1, score_tokens=0)
  for new in (old, old | {"seed": 1}, old | {"settings": 2}):
    run.add(tmp_path / "x.jsonl", new)
  assert [x["settings"] for x in lines_lib.read(tmp_path / "x.jsonl")] == [2]


def test_scores_of_tasks_are_those_of_their_evaluators(tmp_path, monkeypatch):
  row, _ = Rows.rows("mini")
  cfg, args = row.config, argparse.Namespace(scale="mini", tasks="there")
  cfg.workdir = str(tmp_path)

  def common_sense(cfg, given):
    assert given.data == "there" and given.limit == "0"
    found = {t: {"acc": 0.25, "acc_norm": 0.5, "perplexity": 9.0} for t in given.tasks.split(",")}
    (tmp_path / run.harness.FILE).write_text(json.dumps({"tasks": found}))

  def needles(cfg, given):
    assert given.haystack == "there" and given.samples == "50"
    lines = runs.Lines(tmp_path / run.niah.FILE)
    for i, n in enumerate(given.lengths.split(",")):
      lines.add({"kind": given.kinds, "length": int(n)}, score=i / 10)

  monkeypatch.setattr(run.harness, "evaluate", common_sense)
  monkeypatch.setattr(run.niah, "evaluate", needles)
  scores = run.SCORES["table1"](cfg, args)
  assert list(scores.values()) == [9.0, 25.0, 25.0, 50.0, 25.0, 25.0, 50.0, 25.0]
  scores = run.SCORES["table3"](cfg, args)
  assert list(scores) == [f"{kind} {n}" for kind, n in run.table3.CELLS]
  assert list(scores.values()) == [0.0, 10.0, 20.0] * 3


@pytest.mark.parametrize(
  "text, words",
  [
    ('{"labels": {}}\n{"labe', r"x.jsonl:1 has no field 'scale'; a line has labels, scale"),
    ('{"labe', "x.jsonl:1 is cut off or no JSON"),
    ("[1]\n", "x.jsonl:1 is list, but a line must be an object"),
  ],
)
def test_a_bad_file_is_one_sentence(text, words, tmp_path):
  (tmp_path / "x.jsonl").write_text(text)
  with pytest.raises(ValueError, match=re.escape(words)) as e:
    lines_lib.read(tmp_path / "x.jsonl", lines_lib.FIELDS)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  "argv, words",
  [
    (["table9"], "table 'table9' is unknown; accepted are .*table4"),
    (["table4", "--scale=tiny"], "scale 'tiny' is unknown; accepted are paper, small, midi"),
    (["table4", "--only=model"], "--only=model is given; accepted is LABEL=VALUE"),
    (["table4", "--only=size=1"], "--only=size=... is given; the labels are model, context"),
    (["table4", "--only=context=7"], "--only=context=7 is given; accepted are 512, 1024"),
    (["table1", "--tasks=x", "--together"], "--together is given, but table1 is scored on checkp"),
    (["table3"], "--tasks is not given, but table3 is scored on the files that it names"),
    (["table4", "--data=none"], "'none' does not exist"),
  ],
)
def test_the_command_refuses_in_one_sentence(argv, words, tmp_path, capsys):
  assert run.main(["run", *argv, f"--results={tmp_path}"]) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and re.search(words, err)
  assert not list(tmp_path.iterdir())

"""Loss by length of the window and by position: what whole passes give, on any text."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import config, main, metrics, tokenise
from experiments.evals import lengths, runs
from experiments.tokenfile import TokenWriter

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with a corpus, another text, and a run of one step on the corpus."""
  home = tmp_path_factory.mktemp("home")
  rng = np.random.default_rng(0)
  for folder, count in (("corpus", 12), ("other", 8)):
    (home / folder).mkdir()
    for i in range(count):
      text = " ".join(rng.choice(["tree", "größe", "a"], 50))
      (home / folder / f"{i}.txt").write_text(text, encoding="utf-8")
  assert main.main(["main", *flags(home)]) == 0
  (home / "cut.jsonl").write_text('{"text": "one"}\n{"text": "tw')
  (home / "field.jsonl").write_text(json.dumps({"txt": "one"}) + "\n")
  names = {"tokenizer": "byte", "corpus": "none"}
  names["tokenizer_digest"] = tokenise.digest(tokenise.ByteTokenizer())
  with TokenWriter(home / "wrong.tok", vocab_size=257, separator=256, **names) as writer:
    writer.append([1, 2, 3], 3)
  (home / "cut.tok").write_bytes((home / "wrong.tok").read_bytes()[:-9])
  return home


def flags(home, *more):
  fields = f"""
    steps=1 batch_size=1 seq_len=32 data.path={home}/corpus data.cache={home}/cache
    data.vocab_size=280 model.width=16 model.mlp_width=16 model.num_layers=1 model.num_heads=1
    model.mixer=linear_attention optim.warmup_steps=1 eval.batches=1
    log.tensorboard=False workdir={home}/run
  """
  return [*(f"--config.{field}" for field in fields.split()), *more]


def run(home, *more):
  return lengths.main(["lengths", *flags(home), *more])


def lines(home):
  return metrics.read(home / "run" / lengths.FILE)


def test_windows_are_read_from_nothing_and_every_token_counts_once(home, capsys):
  assert run(home, "--lengths=16,48", "--rows_tokens=100") == 0
  job, params = runs.open_run(config.parse(["", *flags(home)]))
  lm, test = runs.model(job, params), job.dataset.test
  logits = nnx.jit(lambda lm, tokens: jax.nn.log_softmax(lm(tokens)[0]))
  for line in lines(home):
    size, nats = line["length"], []
    for start in range(0, test.num_tokens - 1, size):
      window = test.tokens[start : start + size + 1].astype(np.int32)
      tokens = np.zeros((1, size), np.int32)
      tokens[0, : len(window) - 1] = window[:-1]
      log_p = np.asarray(logits(lm, tokens)[0], np.float64)
      nats += zip(-log_p[np.arange(len(window) - 1), window[1:]], range(size))
    total = sum(value for value, _ in nats)
    assert line["tokens"] == len(nats) == test.num_tokens - 1
    assert line["bytes"] == test.num_bytes and line["trained_on"] == 32
    assert line["nats"] == pytest.approx(total, rel=1e-5)
    assert line["perplexity"] == pytest.approx(math.exp(total / len(nats)), rel=1e-5)
    bits = total / math.log(2) / test.num_bytes
    assert line["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    for part in line["by_position"]:
      inside = [v for v, at in nats if part["first"] <= at <= part["last"]]
      assert part["tokens"] == len(inside)
      assert part["perplexity"] == pytest.approx(math.exp(np.mean(inside)), rel=1e-4)
  out = capsys.readouterr().out
  assert "bits_per_byte" in out and "position from" in out


def test_a_length_is_run_once(home, monkeypatch):
  assert run(home, "--lengths=16") == 0
  before, asked = lines(home), []
  real = lengths.scorer
  note = lambda job, text, cell, *rest: asked.append(cell["length"]) or real(job, text, cell, *rest)
  monkeypatch.setattr(lengths, "scorer", note)
  assert run(home, "--lengths=16,24") == 0
  assert asked == [24]
  assert run(home, "--lengths=16", "--max_tokens=64", "--rows_tokens=64") == 0
  last = lines(home)[-1]
  assert last["tokens"] == 64 and lines(home)[: len(before)] == before
  assert asked == [24, 16]


def test_any_text_and_any_token_file_of_the_runs_tokenizer(home):
  """The same documents as text and as a token file, without the splits that text is cut into."""
  documents = ["--lengths=16", "--packing=documents"]
  assert run(home, *documents, f"--data={home}/other", "--split=train") == 0
  text = lines(home)[-1]
  job, _ = runs.open_run(config.parse(["", *flags(home)]))
  opened = lengths.open_text(job, f"{home}/other", "train")
  assert text["tokens"] == opened.num_tokens - 1 and text["corpus"].endswith("other")
  assert run(home, *documents, f"--data={opened.path}") == 0
  again = lines(home)[-1]
  assert (again["nats"], again["bytes"]) == (text["nats"], text["bytes"])


@pytest.mark.parametrize(
  "more, words",
  [
    (["--lengths=1k"], "--lengths: '1k' is given, but it must be an integer >= 1"),
    (["--lengths=0"], "--lengths: '0' is given, but it must be an integer >= 1"),
    (["--split=dev"], "--split=dev is given; accepted are train, validation, test"),
    (["--packing=none"], "--packing=none is given; accepted are documents, concat"),
    (["--max_tokens=all"], "--max_tokens=all is given, but it must be an integer >= 0"),
    (["--data={home}/wrong.tok"], "wrong.tok was made with another tokenizer (byte) than the run"),
    (["--data={home}/none.tok"], "none.tok' does not exist"),
    (["--data={home}/cut.tok"], "cut.tok is truncated"),
    (["--data={home}/none"], "none' does not exist"),
    (["--data={home}/cut.jsonl"], "cut.jsonl:2: not a line of JSON"),
    (["--data={home}/field.jsonl"], "field.jsonl:1: no field 'text' (data.text_field)"),
    (["--config.data.task=mqar"], "config.data.task = 'mqar' is given, but this reads text"),
    (["--config.workdir={home}/none"], "none holds no checkpoint"),
  ],
)
def test_mistakes_are_one_sentence(home, more, words, capsys):
  capsys.readouterr()
  assert run(home, *(flag.format(home=home) for flag in more)) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and err.count("\n") == 1 and words in err

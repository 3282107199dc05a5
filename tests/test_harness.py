"""The harness's adapter: its numbers are the model's own, chance is chance, bad files are said."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import golden

from experiments import main, tokenise
from experiments.errors import UserError
from experiments.evals import harness, harness_tasks, scoring
from trellis_jax import LM, LMConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

BYTES = tokenise.ByteTokenizer()
needs_harness = pytest.mark.skipif(
  importlib.util.find_spec("lm_eval") is None,
  reason="lm_eval is not installed; `pip install '.[eval]'` does it",
)
# One example of each task, and what the stock tasks make of it: (context, choices), the right one.
EXAMPLES = {
  "lambada_openai": {"text": "Give me the map, said Ann, and took the map"},
  "piqa": {"goal": "Dry a cup", "sol1": "Use a towel.", "sol2": "Use soap.", "label": 0},
  "hellaswag": {
    "ind": 1,
    "activity_label": "Surfing",
    "ctx_a": "A man stands up. [step] He waits.",
    "ctx_b": "the wave",
    "ctx": "",
    "endings": ["breaks.", "is a dog.", "sings [title] low.", "reads."],
    "label": "3",
  },
  "winogrande": {
    "sentence": "The cup fell off the shelf as the _ was loose.",
    "option1": "cup",
    "option2": "shelf",
    "answer": "2",
  },
  "arc_easy": {
    "id": "a",
    "question": "What melts?",
    "choices": {"text": ["ice", "a stone", "air"], "label": ["A", "B", "C"]},
    "answerKey": "A",
  },
  "social_iqa": {
    "context": "Ann fell.",
    "question": "What now?",
    "answerA": "she gets up",
    "answerB": "she sings",
    "answerC": "she eats",
    "label": "2",
  },
  "boolq": {"passage": "Ice is cold.", "question": "is ice warm", "idx": 0, "label": 0},
}
EXAMPLES["arc_challenge"] = EXAMPLES["arc_easy"] | {"id": "b", "answerKey": "C"}
PROMPTS = {
  "lambada_openai": ("Give me the map, said Ann, and took the", [" map"], 0),
  "piqa": ("Question: Dry a cup\nAnswer:", [" Use a towel.", " Use soap."], 0),
  "hellaswag": (
    "Surfing: A man stands up. He waits. The wave",
    [" breaks.", " is a dog.", " sings. low.", " reads."],
    3,
  ),
  "arc_easy": ("Question: What melts?\nAnswer:", [" ice", " a stone", " air"], 0),
  "arc_challenge": ("Question: What melts?\nAnswer:", [" ice", " a stone", " air"], 2),
  "social_iqa": ("Q: Ann fell. What now?\nA:", [" she gets up", " she sings", " she eats"], 1),
  "boolq": ("Ice is cold.\nQuestion: is ice warm?\nAnswer:", [" no", " yes"], 0),
}


@pytest.fixture(scope="module")
def lm():
  knobs = {"trellis": dict(num_slots=8, chunk_size=4)}
  sizes = dict(width=16, num_layers=1, num_heads=2, mlp_width=16)
  return LM(LMConfig(BYTES.vocab_size, **sizes, mixers=knobs, init_std=0.5), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def adapter(lm):
  from experiments.evals.harness_lm import HarnessLM

  return HarnessLM(scoring.Scorer(lm, BYTES.bos_id, rows=8, piece=64), BYTES)


@pytest.fixture(scope="module")
def plain(lm):
  """The log-probability of a text's last characters, by one pass over the whole text."""
  run = nnx.jit(lambda lm, tokens: jax.nn.log_softmax(lm(tokens)[0]))

  def score(context, more):
    whole = [BYTES.bos_id, *(context + more).encode()]
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(whole)] = whole
    log_p = np.asarray(run(lm, jnp.asarray(tokens))[0], np.float64)
    at = np.arange(len(context.encode()), len(whole) - 1)
    return log_p[at, whole[at[0] + 1 :]].sum() if len(at) else 0.0

  return score


@pytest.fixture
def folder(tmp_path):
  """A folder with a file of one example for every task."""
  for name, example in EXAMPLES.items():
    path = harness_tasks.file_of(name, tmp_path)
    path.write_text(json.dumps(example) + "\n")
  return tmp_path


def _instance(*arguments):
  from lm_eval.api.instance import Instance

  return Instance("loglikelihood", {}, arguments, 0)


@needs_harness
def test_log_likelihoods_are_the_models_own(adapter, plain):
  pairs = [
    ("A cup", " of tea"),
    ("A cup", " of water"),
    ("", "Once"),
    ("größe ist", " gut"),
    ("trailing ", "blank"),
    ("x" * 100, "y"),
  ]
  found = adapter.loglikelihood([_instance(*pair) for pair in pairs], disable_tqdm=True)
  for (context, more), (value, _) in zip(pairs, found):
    stripped = context.rstrip()  # the harness moves blanks to the continuation
    expected = plain(stripped, context[len(stripped) :] + more)
    assert value == pytest.approx(expected, abs=1e-4)


@needs_harness
def test_rolling_log_likelihoods_are_of_whole_texts(adapter, plain):
  texts = ["Once upon a time", "", "größe", "y" * 120]
  found = adapter.loglikelihood_rolling([_instance(text) for text in texts])
  for text, value in zip(texts, found):
    assert value == pytest.approx(plain("", text), abs=1e-4)


@needs_harness
def test_generation_is_greedy_up_to_a_stop(adapter):
  ask = lambda context, **kwargs: adapter.generate_until([_instance(context, kwargs)])[0]
  whole = ask("A cup", max_gen_toks=24)
  tokens = adapter.scorer.greedy([BYTES.encode("A cup")], 24, lambda *_: False)[0]
  end = tokens.index(BYTES.eos_id) if BYTES.eos_id in tokens else None
  assert whole == BYTES.decode(tokens[:end]) and len(whole) > 3
  stop = whole[2]
  assert ask("A cup", until=[stop, "never there"], max_gen_toks=24) == whole[: whole.index(stop)]
  assert ask("A cup", until=stop, max_gen_toks=24) == whole[: whole.index(stop)]
  requests = [
    _instance("A cup", {"max_gen_toks": 3}),
    _instance("Tea", {"max_gen_toks": 5, "do_sample": False, "temperature": 0.0}),
    _instance("A cup", {"max_gen_toks": 24, "until": []}),
  ]
  several = adapter.generate_until(requests)
  assert [several[0], several[2]] == [BYTES.decode(tokens[:3]), whole]
  with pytest.raises(UserError, match="a task asks for sampling"):
    ask("A cup", do_sample=True, temperature=0.7)


@needs_harness
def test_the_tasks_prompts_and_metrics_are_those_of_the_stock_ones(adapter, plain, folder):
  names = list(PROMPTS)
  results = harness.run_tasks(adapter, names, folder, limit=0, fewshot=0)
  for name, (context, choices, right) in PROMPTS.items():
    scores = np.array([plain(context, choice) for choice in choices])
    assert results[name]["examples"] == 1
    if name == "lambada_openai":
      assert results[name]["perplexity"] == pytest.approx(math.exp(-scores[0]), rel=1e-4)
      continue
    assert results[name]["acc"] == (scores.argmax() == right)
    if "acc_norm" in results[name]:
      lengths = [len(choice) - 1 for choice in choices]
      assert results[name]["acc_norm"] == ((scores / lengths).argmax() == right)


@needs_harness
def test_winogrande_compares_the_same_end_after_either_option(adapter, plain, folder):
  results = harness.run_tasks(adapter, ["winogrande"], folder, limit=0, fewshot=0)
  end = " was loose."
  scores = [
    plain(f"The cup fell off the shelf as the {option}", end) for option in ("cup", "shelf")
  ]
  assert results["winogrande"]["acc"] == (scores[1] > scores[0])


@needs_harness
def test_a_uniform_model_scores_chance(tmp_path):
  """Every byte has the same chance: the shortest choice wins, whatever it says."""
  from experiments.evals.harness_lm import HarnessLM

  data, few = golden("commonsense"), tmp_path / "few"
  few.mkdir()
  names = ["piqa", "arc_easy", "winogrande", "social_iqa", "lambada_openai"]
  for name in names:
    lines = harness_tasks.file_of(name, data).read_text().splitlines(keepends=True)[:60]
    harness_tasks.file_of(name, few).write_text("".join(lines))
  sizes = dict(width=8, num_layers=1, num_heads=1, mlp_width=8, mixer="linear_attention")
  graphdef, params = nnx.split(LM(LMConfig(BYTES.vocab_size, **sizes), rngs=nnx.Rngs(0)))
  blind = nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, params))
  model = HarnessLM(scoring.Scorer(blind, BYTES.bos_id, rows=16, piece=64), BYTES)
  results = harness.run_tasks(model, names, few, limit=0, fewshot=0)
  rows = lambda name: map(json.loads, harness_tasks.file_of(name, few).read_text().splitlines())
  lengths = lambda *choices: [len(choice.encode()) for choice in choices]
  wins = {
    "piqa": [int(np.argmin(lengths(r["sol1"], r["sol2"]))) == r["label"] for r in rows("piqa")],
    "arc_easy": [
      r["choices"]["label"][np.argmin(lengths(*r["choices"]["text"]))] == r["answerKey"]
      for r in rows("arc_easy")
    ],
    # Either option is followed by the same end: a tie, and the first one is taken.
    "winogrande": [r["answer"] == "1" for r in rows("winogrande")],
    "social_iqa": [
      int(np.argmin(lengths(r["answerA"], r["answerB"], r["answerC"]))) + 1 == int(r["label"])
      for r in rows("social_iqa")
    ],
  }
  # Guessing.
  chances = {"piqa": 1 / 2, "arc_easy": 1 / 4, "winogrande": 1 / 2, "social_iqa": 1 / 3}
  for name, right in wins.items():
    assert results[name]["acc"] == pytest.approx(np.mean(right), abs=1e-9)
    chance = chances[name]
    assert abs(results[name]["acc"] - chance) < 4 * math.sqrt(chance * (1 - chance) / 60)
  targets = [len(r["text"].split(" ")[-1].encode()) + 1 for r in rows("lambada_openai")]
  perplexity = math.exp(np.mean(targets) * math.log(BYTES.vocab_size))
  assert results["lambada_openai"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)


@needs_harness
def test_a_table_names_each_metric_and_the_average():
  results = {
    "piqa": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.9, "examples": 10},
    "arc_challenge": {"acc": 0.1, "acc_norm": 0.25, "acc_norm_stderr": 0.02, "examples": 4},
    "lambada_openai": {"acc": 0.0, "perplexity": 20.28, "examples": 3},
  }
  text = harness.table(results)
  found = {tuple(line.split()[:2]): line.split()[2:] for line in text.splitlines()[2:]}
  assert found["piqa", "acc"] == ["10", "50.00", "10.00"]
  assert found["arc_challenge", "acc_norm"] == ["4", "25.00", "2.00"]
  assert found["lambada_openai", "perplexity"] == ["3", "20.28"]
  assert found["average", "25.00"] == []


@pytest.mark.parametrize("name", [n for n in harness_tasks.TASKS if n != "boolq"])
def test_the_published_files_have_the_fields_that_are_read(name):
  assert harness_tasks.check_file(name, golden("commonsense")) > 500


@pytest.mark.parametrize(
  "text, words",
  [
    (None, "piqa_validation.jsonl does not exist; task piqa reads it"),
    ("", "piqa_validation.jsonl holds no examples"),
    ('{goal}\n{"goal": "a", "so', "piqa_validation.jsonl:2: not a line of JSON"),
    ("{goal}\n\n{goal}\n", "piqa_validation.jsonl:2: not a line of JSON"),
    ("{goal}\n[1]\n", "piqa_validation.jsonl:2: no object; accepted is one with goal, sol1, sol2"),
    (
      '{"goal": "a", "sol1": "b", "solution2": "c", "label": 1}\n',
      "piqa_validation.jsonl:1: no field 'sol2'; task piqa reads goal, sol1, sol2, label",
    ),
    (b'{"goal": "\xff"}\n', "piqa_validation.jsonl:1: not a line of JSON"),
  ],
)
def test_a_bad_file_is_one_sentence(text, words, tmp_path):
  if text is not None:
    if isinstance(text, str):
      text = text.replace("{goal}", json.dumps(EXAMPLES["piqa"])).encode()
    (tmp_path / "piqa_validation.jsonl").write_bytes(text)
  with pytest.raises(UserError) as e:
    harness_tasks.check_file("piqa", tmp_path)
  assert words in str(e.value) and "\n" not in str(e.value)


def test_without_the_harness_the_command_says_how_to_install_it(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert harness.main(["harness"]) == 2
  assert capsys.readouterr().err == (
    "error: lm_eval is not installed; `pip install '.[eval]'` does it\n"
  )


@needs_harness
@pytest.mark.parametrize(
  "flags, words",
  [
    (["--tasks=sums", "--data={data}"], "task 'sums' is unknown; accepted with --data are lambada"),
    (["--tasks=piqa", "--data={data}/none"], "none is given, but there is no such folder"),
    (["--tasks=piqa", "--data={data}/empty"], "piqa_validation.jsonl does not exist"),
    (["--data={data}", "--limit=some"], "--limit=some is given, but it must be an integer"),
    (["--data={data}", "--rows=0"], "--rows=0 is given, but it must be an integer >= 1"),
    (["--data={data}", "--config.workdir={data}/none"], "none holds no checkpoint"),
  ],
)
def test_the_commands_mistakes_are_one_sentence(flags, words, folder, capsys):
  (folder / "empty").mkdir()
  assert harness.main(["harness", *(flag.format(data=folder) for flag in flags)]) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and err.count("\n") == 1 and words in err


@needs_harness
def test_the_command_writes_the_results_of_a_run(folder, tmp_path, capsys):
  """In a process of its own, without a network: what it may fetch, it must not need."""
  (tmp_path / "corpus").mkdir()
  for i in range(10):
    (tmp_path / "corpus" / f"{i}.txt").write_text(f"text {i} " * 40)
  fields = f"""
    steps=1 batch_size=1 seq_len=64 data.path={tmp_path}/corpus data.cache={tmp_path}/cache
    data.tokenizer=byte model.width=16 model.mlp_width=16 model.num_layers=1 model.num_heads=1
    model.mixer=linear_attention optim.warmup_steps=1 eval.batches=1 log.tensorboard=False
    workdir={tmp_path}/run
  """
  flags = [f"--config.{field}" for field in fields.split()]
  assert main.main(["main", *flags]) == 0
  command = [sys.executable, "-m", "experiments.evals.harness", *flags, f"--data={folder}"]
  path = os.pathsep.join(filter(None, sys.path))
  env = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(tmp_path / "hf"), "HTTPS_PROXY": "none:1"}
  done = subprocess.run(
    [*command, "--tasks=piqa,lambada_openai"], env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert "perplexity" in done.stdout and "piqa" in done.stdout
  report = json.loads((tmp_path / "run" / harness.FILE).read_text())
  assert report["step"] == 1 and list(report["tasks"]) == ["piqa", "lambada_openai"]
  assert report["tasks"]["piqa"]["examples"] == 1

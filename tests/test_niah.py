"""Needles in haystacks: RULER's own samples, lengths that always fit, the scores."""

import json
import pathlib
import re

import jax
import pytest
from golden import golden

from experiments import essays, haystacks, main, metrics, needles, tokenise
from experiments.errors import UserError
from experiments.evals import niah as retrieval

jax.config.update("jax_numpy_rank_promotion", "raise")

BYTES = tokenise.ByteTokenizer()
STORY = """
  Mr. Fox went out. "Is it cold?" he asked. It was not, said the owl! They walked for
  an hour, and then (so she says.) they came to the river... Nobody was there. A. Crow sang: "La!"
"""
FILES = ["1024_niah_single_1", "4096_niah_single_1", "4096_niah_single_2", "4096_niah_single_3"]


@pytest.fixture(scope="module")
def essay():
  return essays.Essay(STORY)


def _generator(kind="niah_single_1", tokenizer=BYTES, essay=None, **knobs):
  return haystacks.Generator(kind, tokenizer, essay=essay, **knobs)


def _parse(text, prefix):
  """(key, answer, what stands before the needle, what after) of a sample's text."""
  key = re.search(r"for (\S+) mentioned in the provided text is$", prefix)[1]
  start, context = text.split("\n", 1)
  context, question = context.rsplit("\n", 1)
  needle = re.search(rf"One of the special magic \w+ for {key} is: (\S+)\.", context)
  before, after = context[: needle.start()], context[needle.end() :]
  return key, needle[1], before, after, f"{start}\n", f"\n{question}"


@pytest.mark.parametrize("name", FILES)
def test_the_published_samples_are_ours_to_the_byte(name):
  """Each of theirs is what we render of its key, its answer and a cut of the haystack of ours."""
  kind = name.partition("_")[2]
  words = needles.words_of(str(golden("needle_words")))
  path = golden("ruler_golden") / f"bytes_{name}.jsonl"
  kim = essays.load(str(golden("books") / "val" / "Kipling_Kim_1901.txt"))
  samples = [json.loads(line) for line in path.read_text().splitlines()]
  assert len(samples) == 20
  for sample in samples:
    key, answer, before, after, *_ = _parse(sample["input"], sample["answer_prefix"])
    assert sample["outputs"] == [answer]
    assert re.fullmatch(r"[1-9]\d{6}" if kind[-1] != "3" else r"[0-9a-f-]{36}", answer)
    adjective, noun = key.split("-", 1)
    assert adjective in words[0] and noun in words[1]
    if kind == "niah_single_1":
      lines = [s.split("\n") if s else [] for s in (before.rstrip("\n"), after.lstrip("\n"))]
      assert set(lines[0] + lines[1]) == {needles.LINE} and lines[1]
      cuts = ["\n".join(s) for s in lines]
    else:
      count = len((before + after).split())
      cuts = [before[:-1], after[1:]]
      assert tuple(cuts) in [kim.cut(count, depth) for depth in needles.DEPTHS]
    prompt, prefix = needles.render(kind, key, answer, *cuts)
    assert (prompt, prefix) == (sample["input"], sample["answer_prefix"])
    assert sample["length"] == len(BYTES.encode(prompt + prefix)) + needles.NEW_TOKENS


@pytest.mark.parametrize("kind", needles.KINDS)
@pytest.mark.parametrize("length", [600, 1024, 4096, 131072])
def test_samples_have_the_structure_of_the_published_ones(kind, length, essay):
  generator = _generator(kind, essay=essay)
  places = set()
  for i in range(40 if length < 10_000 else 3):
    sample = generator.sample(i, length)
    key, answer, before, after, about, question = _parse(sample.prompt, sample.prefix)
    value = needles.KINDS[kind][1]
    assert about == needles.ABOUT.format(value=value)
    assert question == needles.QUESTION.format(value=value, key=key)
    assert answer == sample.answer and sample.prompt.count(answer) == 1
    assert re.fullmatch(r"[1-9]\d{6}" if value == "number" else r"[0-9a-f-]{36}", answer)
    if kind == "niah_single_1":
      assert set((before + after).split("\n")) == {needles.LINE, ""}
      unit = len(needles.LINE) + 1
    else:
      words = (before + after).split()
      assert words == (STORY.split() * len(words))[: len(words)]
      # Before the first sentence, between two, or after the last one, which may be cut.
      assert not before.strip() or not after.strip() or re.search(r"[.!?][\"')]? $", before)
      unit = max(map(len, STORY.split())) + 1
    text = len((sample.prompt + sample.prefix).encode())
    assert text + 128 == sample.length <= length < sample.length + unit
    places.add(round(4 * len(before) / len(before + after)))
  assert length != 4096 or len(places) == 5


def test_it_is_the_longest_that_fits(essay):
  """One more byte of room for each of the lengths: a sample grows only when it may."""
  generator = _generator("niah_single_2", essay=essay)
  lengths = range(500, 640)
  found = [generator.sample(0, n) for n in lengths]
  sizes = [len(s.prompt.split()) for s in found]
  assert sizes == sorted(sizes) and 10 < len(set(sizes)) < len(sizes)
  for a, b, length in zip(found, found[1:], lengths):
    assert a == b or b.length == length + 1 > a.length


@pytest.mark.parametrize("kind", needles.KINDS)
def test_any_tokenizer(kind, essay):
  bpe = tokenise.train_bpe([STORY, needles.ABOUT, needles.LINE] * 3, 400)
  generator = _generator(kind, bpe, essay)
  for i in range(5):
    sample = generator.sample(i, 700)
    assert len(bpe.encode(sample.prompt + sample.prefix)) + 128 == sample.length
    assert 660 < sample.length <= 700


def test_a_sample_depends_on_seed_kind_split_and_number_alone(essay):
  make = lambda **knobs: _generator(**{"essay": essay} | knobs)
  assert make().sample(3, 900) == make().sample(3, 900)
  several = [make(), make(seed=1), make(split="train")]
  answers = {g.sample(i, 900).answer for g in several for i in range(20)}
  assert len(answers) == 60
  keys = {_parse(s.prompt, s.prefix)[0] for s in (make().sample(i, 900) for i in range(100))}
  assert len(keys) > 90
  assert make().sample(3, 700).answer == make().sample(3, 900).answer


def test_without_the_needle_the_answer_is_nowhere(essay):
  for kind in needles.KINDS:
    sample = _generator(kind, essay=essay).sample(0, 1000, needle=False)
    assert sample.answer == _generator(kind, essay=essay).sample(0, 1000).answer
    assert sample.answer not in sample.prompt and "One of" not in sample.prompt
    assert sample.length > 900


def test_sentences_end_at_marks_before_words_that_can_begin_one(essay):
  ends = [word for word, end in zip(essay.words, essay.ends) if end]
  assert ends == ["out.", "asked.", "owl!", "river...", "there.", '"La!"']
  assert essay.cut(0, 50) == ("", "")
  assert essay.cut(5, 0) == ("", 'Mr. Fox went out. "Is')
  assert essay.cut(5, 50) == ("Mr. Fox went out.", '"Is')
  assert essay.cut(5, 100) == ('Mr. Fox went out. "Is', "")
  count = len(essay.words)
  assert essay.cut(3 * count, 34)[0].split() == essay.words
  assert essay.cut(3, 100, 1) == ("Fox went out.", "")  # from its second word, and over its end
  assert essay.cut(4, 100, count - 1) == ('"La!" Mr. Fox went', "")


def test_a_haystack_may_begin_anywhere_and_all_else_stays(essay):
  first = [_generator("niah_single_2", essay=essay).sample(i, 700) for i in range(8)]
  made = _generator("niah_single_2", essay=essay, anywhere=True)
  other = [made.sample(i, 700) for i in range(8)]
  assert [x.answer for x in first] == [x.answer for x in other]
  begins = lambda x: x.prompt.split("\n")[1].split()[0]
  assert {begins(x) for x in first} <= {"Mr.", "One"} and len({begins(x) for x in other}) > 4
  assert other == [made.sample(i, 700) for i in range(8)]


def test_a_sample_that_is_too_short_for_the_question_goes_without_it():
  generator = _generator(bare=True, new_tokens=12)
  asked = _generator(new_tokens=12).shortest(0)
  assert generator.sample(0, asked) == _generator(new_tokens=12).sample(0, asked)
  short = generator.sample(0, asked - 1)
  assert short.length <= asked - 1 and "quiz" not in short.prompt and "What is" not in short.prompt
  assert needles.LINE in short.prompt and short.answer in short.prompt
  assert short.prefix == generator.sample(0, asked).prefix
  needle = generator.sample(0, generator.shortest(0))
  key = re.search(r"number for (\S+) mentioned", needle.prefix)[1]
  assert needle.prompt == f"One of the special magic numbers for {key} is: {needle.answer}."


@pytest.mark.parametrize(
  "call, words",
  [
    (
      lambda e: _generator("niah_multi"),
      "kind 'niah_multi' is unknown; accepted are niah_single_1",
    ),
    (lambda e: _generator("niah_single_2"), "niah_single_2 hides its needle in an essay, but no"),
    (lambda e: _generator().sample(0, 400), "length=400 is too short for niah_single_1; accepted"),
    (lambda e: _generator("niah_single_3", essay=e).sample(0, 470), "length=470 is too short"),
    (lambda e: essays.Essay(" \n"), "the haystack's text has no words"),
    (lambda e: essays.load("/nowhere"), "'/nowhere' does not exist"),
    (lambda e: needles.words_of("/nowhere"), "nowhere/adjectivelist.txt is not a list of words"),
  ],
)
def test_what_does_not_fit_is_one_sentence(call, words, essay):
  with pytest.raises(UserError) as e:
    call(essay)
  assert words in str(e.value) and "\n" not in str(e.value)


def test_a_haystack_is_a_folders_text_in_the_order_of_its_names(tmp_path):
  for name, text in (("b.txt", "three four"), ("a.txt", "one two"), ("c.txt", "five")):
    (tmp_path / name).write_text(text)
  assert essays.load(str(tmp_path)).words == ["one", "two", "three", "four", "five"]
  (tmp_path / "lines.jsonl").write_text('{"text": "six"}\n{"te')
  with pytest.raises(UserError, match=r"lines.jsonl:2: not a line of JSON"):
    essays.load(str(tmp_path))


def _reader(prompts, most, done):
  """Finds the needle, and says in capitals what it says; what is not there it does not know."""
  rows = []
  for prompt in prompts:
    found = re.search(r" is: (\S+)\.", BYTES.decode(prompt))
    rows.append(BYTES.encode(f" maybe {found[1].upper() if found else 'not'}")[:most])
    assert done(len(rows) - 1, rows[-1]) == bool(found)
  return rows


@pytest.mark.parametrize("kind", needles.KINDS)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_who_finds_the_needle_scores_1_and_without_a_needle_0(kind, rows, essay):
  evaluator = retrieval.Evaluator(_reader, BYTES, rows)
  for needle in (True, False):
    make = lambda i, needle=needle: _generator(kind, essay=essay).sample(i, 1024, needle)
    found = list(evaluator.run(make, 10))
    assert [hit for _, hit, _ in found] == [needle] * 10
    assert [sample for sample, *_ in found] == [make(i) for i in range(10)]


def test_nothing_counts_behind_the_end_of_the_document():
  sample = _generator().sample(0, 700)
  after = [BYTES.eos_id, *BYTES.encode(sample.answer)]
  evaluator = retrieval.Evaluator(lambda *_: [after], BYTES)
  assert list(evaluator.run(lambda i: sample, 1)) == [(sample, False, "")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The flags of a short run on the task, and its workdir."""
  workdir = tmp_path_factory.mktemp("run")
  fields = f"""
    steps=1 batch_size=1 seq_len=512 data.task=niah data.niah.min_length=400 eval.batches=1
    model.width=16 model.mlp_width=16 model.num_layers=1 model.mixer=linear_attention
    model.num_heads=1 optim.warmup_steps=1 log.tensorboard=False workdir={workdir}
  """
  flags = [f"--config.{field}" for field in fields.split()]
  assert main.main(["main", *flags]) == 0
  return flags, workdir


def test_the_command_writes_lines_and_goes_on_where_it_stopped(run, monkeypatch, capsys):
  flags, workdir = run
  story = pathlib.Path(workdir) / "story.txt"
  story.write_text(STORY)
  flags = [*flags, f"--haystack={story}", "--samples=3", "--rows=2"]
  assert retrieval.main(["niah", *flags, "--lengths=640", "--kinds=niah_single_3"]) == 0
  (line,) = metrics.read(workdir / retrieval.FILE)
  assert (line["kind"], line["length"], line["step"], line["score"]) == ("niah_single_3", 640, 1, 0)
  assert len(line["outputs"]) == 3 and len(line["outputs"][0]["answer"]) == 36
  asked = []
  real = retrieval.Evaluator.run
  monkeypatch.setattr(
    retrieval.Evaluator, "run", lambda self, s, n: asked.append(s(0).kind) or real(self, s, n)
  )
  kinds = "--kinds=niah_single_1,niah_single_3"
  assert retrieval.main(["niah", *flags, "--lengths=640", kinds]) == 0
  assert asked == ["niah_single_1"]
  assert "niah_single_3    0.0" in capsys.readouterr().out
  assert [line["kind"] for line in metrics.read(workdir / retrieval.FILE)] == [
    "niah_single_3",
    "niah_single_1",
  ]


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--kinds=sums"], "--kinds: 'sums' is unknown; accepted are niah_single_1"),
    (["--lengths=1k"], "--lengths: '1k' is given, but it must be an integer"),
    (["--samples=0"], "--samples=0 is given, but it must be an integer >= 1"),
    (["--needle=no"], "--needle=no is given; accepted are true, false"),
    ([], "niah_single_2 hides its needle in an essay, but no haystack"),
    (["--kinds=niah_single_1", "--lengths=256"], "length=256 is too short"),
    (["--haystack=/nowhere"], "'/nowhere' does not exist"),
    (["--words=/nowhere"], "is not a list of words"),
    (["--config.data.niah.seed=1"], "data.niah.seed = 0 (here 1)"),
  ],
)
def test_the_commands_mistakes_are_one_sentence(run, flags, words, capsys):
  assert retrieval.main(["niah", *run[0], *flags]) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and err.count("\n") == 1 and words in err

"""Needles in haystacks: RULER's own samples, lengths that always fit, the task, the scores."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from golden import golden

from experiments import config, data, essays, haystacks, main, metrics, needles, tasks, tokenise
from experiments.errors import UserError
from experiments.evals import niah as retrieval
from experiments.tasks import niah

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


KNOBS = {
  "kinds": "niah_single_1, niah_single_3",
  "haystack": "",
  "words": "",
  "tokenizer": "byte",
  "min_length": 100,
  "answer_only": True,
  "grow_examples": 0,
  "train_examples": 50,
  "held_out_examples": 10,
  "seed": 0,
}


def _segments(row):
  """(tokens, targets, weights) of each of a row's samples."""
  ids = row["segment_ids"]
  for number in range(1, ids.max() + 1):
    yield tuple(row[name][ids == number] for name in ("tokens", "targets", "weights"))


@pytest.mark.parametrize("answer_only", [True, False])
def test_rows_teach_the_answers(tmp_path, answer_only):
  (tmp_path / "story.txt").write_text(STORY)
  knobs = niah.Config(**KNOBS | {"haystack": str(tmp_path), "answer_only": answer_only})
  rows = niah.Rows(knobs, "train", 1200)
  assert (len(rows), len(niah.Rows(knobs, "test", 1200)), knobs.vocab_size) == (50, 10, 257)
  first, sizes, begins, said = [], [], set(), set()
  for i in range(50):
    row = rows[i]
    used = int((row["segment_ids"] > 0).sum())
    assert used > 900 and not row["weights"][used:].any()
    for j, (tokens, targets, weights) in enumerate(_segments(row)):
      np.testing.assert_array_equal(tokens[1:], targets[:-1])
      assert tokens[0] == targets[-1] == BYTES.eos_id
      text = BYTES.decode(tokens.tolist())
      assert ("uuid" in text) == ((i + j) % 2 == 1)
      head, answer = text.rsplit("provided text is", 1)
      assert re.search(rf"is: {re.escape(answer.strip())}", head)  # the needle's own words
      assert BYTES.decode(targets[weights > 0].tolist()) == (answer if answer_only else text)
      assert answer not in said
      said.add(answer)
      sizes.append(len(tokens))
      first += [len(tokens)] if j == 0 else []
      if "uuid" in text and "quiz" in text:
        begins.add(text.split("\n")[1].split()[0])
  assert min(first) < 200 and 1000 < max(first) <= 1200 and 300 < np.median(first) < 700
  assert min(sizes) < 170 and np.median(sizes) < 400 and len(sizes) > 100
  assert len(begins) > 5


def test_a_sample_that_is_too_short_for_the_question_goes_without_it():
  generator = _generator(bare=True, new_tokens=12)
  asked = _generator(new_tokens=12).shortest(0)
  assert generator.sample(0, asked) == _generator(new_tokens=12).sample(0, asked)
  short = generator.sample(0, asked - 1)
  assert short.length <= asked - 1 and "quiz" not in short.prompt and "What is" not in short.prompt
  assert needles.LINE in short.prompt and short.answer in short.prompt
  assert short.prefix == generator.sample(0, asked).prefix
  needle = generator.sample(0, generator.shortest(0))
  assert (
    needle.prompt == f"One of the special magic numbers for {_key(needle)} is: {needle.answer}."
  )


def _key(sample):
  return re.search(r"number for (\S+) mentioned", sample.prefix)[1]


def test_samples_grow_and_kinds_join_from_row_to_row(tmp_path):
  (tmp_path / "story.txt").write_text(STORY)
  kinds = "niah_single_1, niah_single_2"
  knobs = dict(kinds=kinds, haystack=str(tmp_path), min_length=32, grow_examples=40)
  config = niah.Config(**KNOBS | knobs)
  rows = niah.Rows(config, "train", 1200)
  samples = [[t for t, *_ in _segments(rows[i])] for i in range(50)]
  longest = [max(map(len, row)) for row in samples]
  # A bare needle has about 150 bytes, whatever is asked for.
  assert max(longest[:10]) < 180 and max(longest[:25]) < 400 and max(longest[40:]) > 900
  assert [rows.longest(i) for i in (0, 20, 40, 49)] == [32, 79, 1200, 1200]  # 32^.75 1200^.25
  numbers = [len(rows.generators_of(i)) for i in range(50)]
  assert numbers == [1] * 20 + [2] * 30
  held_out = niah.Rows(config, "validation", 1200)
  assert held_out.longest(0) == 1200 and len(held_out.generators_of(0)) == 2
  assert rows.in_order and not held_out.in_order


def test_a_bpe_of_samples_has_numbers_of_few_tokens(tmp_path):
  (tmp_path / "story.txt").write_text(STORY)
  knobs = KNOBS | {"haystack": str(tmp_path), "tokenizer": "bpe-700", "grow_examples": 40}
  bpe = niah.Config(**knobs).loaded
  assert (bpe.name, bpe.vocab_size) == ("bpe-700", 700)
  assert niah.Config(**knobs).loaded is bpe  # trained once
  numbers = [len(bpe.encode(f" {n}")) for n in range(4_000_000, 4_900_000, 30_011)]
  assert np.mean(numbers) < 6  # of 7 digits
  for text in ("One of the special magic numbers", needles.LINE, "größe\n"):
    assert bpe.decode(bpe.encode(text)) == text
  row = niah.Rows(niah.Config(**knobs), "test", 600)[0]
  assert " mentioned in the provided text is" in bpe.decode(row["tokens"].tolist())
  # A checkpoint is of its tokens, which other samples would not have.
  identity = lambda **more: tasks.TaskDataset("niah", niah.Config(**knobs | more)).identity
  assert identity() == {"corpus": "niah", "tokenizer": tokenise.digest(bpe)}
  assert identity(kinds="niah_single_1") != identity()


def test_rows_that_grow_are_not_shuffled():
  def first(grow):
    config = niah.Config(**KNOBS | {"kinds": "niah_single_1", "grow_examples": grow})
    split = tasks.Split("niah", config, "train")
    batches = data.loader(split, seq_len=1200, batch_size=2)
    rows = split.rows(1200)
    return [[batch["tokens"].tolist() for _, batch in zip(range(2), batches)]] + [
      [[rows[2 * step + i]["tokens"].tolist() for i in range(2)] for step in range(2)]
    ]

  loaded, in_order = first(40)
  assert loaded == in_order
  loaded, in_order = first(0)
  assert loaded != in_order


@pytest.mark.parametrize(
  "knobs, seq_len, words",
  [
    ({}, 1200, "niah_single_3 hides its needle in an essay"),
    ({"kinds": "niah_single_1"}, 100, "length=100 is too short for niah_single_1"),
    ({"kinds": "sums"}, 1200, "kind 'sums' is unknown"),
    ({"tokenizer": "bpe-100"}, 1200, "'bpe-100'; accepted is at least 'bpe-257'"),
    ({"tokenizer": "/nowhere.json"}, 1200, "tokenizer '/nowhere.json' does not exist"),
    ({"min_length": 0}, 1200, "data.niah.min_length=0; accepted is at least 1"),
    ({"seed": -1}, 1200, "data.niah.seed=-1; accepted is at least 0"),
    ({"grow_examples": -1}, 1200, "data.niah.grow_examples=-1; accepted is at least 0"),
  ],
)
def test_a_task_that_does_not_fit_is_one_sentence(knobs, seq_len, words):
  with pytest.raises(UserError) as e:
    niah.Rows(niah.Config(**KNOBS | knobs), "train", seq_len)
  assert words in str(e.value) and "\n" not in str(e.value)


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


def test_a_run_on_the_task_is_a_dataset():
  cfg = config.parse(["", "--config.data.task=niah"])
  dataset = data.load(cfg.data)
  batch = next(data.loader(dataset.train, seq_len=1024, batch_size=2))
  assert isinstance(dataset, tasks.TaskDataset) and batch["weights"].sum() == 2 * 10

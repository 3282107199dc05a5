"""Text of needles in haystacks: what its documents say, and where it comes from."""

import json
import re

import pytest

from experiments import corpus, data, essays, needle_text
from experiments.configs import default

WORDS = {"train": "oak elm ash", "validation": "cod eel ray", "test": "ant bee fly"}


@pytest.fixture
def haystack(tmp_path):
  for split, words in WORDS.items():
    (tmp_path / "haystack" / split).mkdir(parents=True)
    (tmp_path / "haystack" / split / "a.txt").write_text(f"{words}. " * 50)
  return tmp_path / "haystack"


def _write(tmp_path, haystack, *flags):
  to = tmp_path / "needles"
  argv = ["needle_text", f"--to={to}", f"--haystack={haystack}", "--documents=60", *flags]
  assert needle_text.main(argv) == 0
  return {
    split: [json.loads(line)["text"] for line in (to / f"{split}.jsonl").read_text().splitlines()]
    for split in corpus.SPLITS
  }


def test_documents_ask_for_the_needle_that_they_hide_in_their_splits_text(tmp_path, haystack):
  samples = ("--most=2048", "--facts=0")
  found = _write(tmp_path, haystack, *samples)
  assert [len(found[split]) for split in corpus.SPLITS] == [60, 3, 3]
  keys = {}
  for split, texts in found.items():
    others = " ".join(words for name, words in WORDS.items() if name != split).split()
    for i, text in enumerate(texts):
      assert len(text.encode()) <= 2048
      key, answer = re.search(
        r"for (\S+) mentioned in the provided text is (\S+)\.$", text
      ).groups()
      assert text.count(f"for {key} is: {answer}.") == 1
      assert ("The grass is green." in text, "uuid" in text) == (i % 3 == 0, i % 3 == 2)
      assert not set(others) & set(re.findall(r"\w+", text))
      keys[split, i] = answer
  assert len(set(keys.values())) == 66
  sizes = sorted(len(text) for text in found["train"])
  begins = {text.split("\n")[1].split()[0] for text in found["train"] if "grass" not in text}
  assert begins >= {"oak", "elm", "ash."}
  assert sizes[0] < 640 and sizes[-1] > 1600 and 800 < sizes[30] < 1300  # even on a log scale
  assert _write(tmp_path, haystack, *samples) == found
  assert _write(tmp_path, haystack, *samples, "--seed=1")["train"] != found["train"]


def test_half_of_the_documents_are_facts_that_hold(tmp_path, haystack):
  found = _write(tmp_path, haystack)["train"]
  lists = [text for text in found if "quiz" not in text]
  assert 20 < len(lists) < 40
  sizes = set()
  for text in lists:
    pairs = [re.fullmatch(r"(\S+-\S+) is (\S+)\.", line).groups() for line in text.split("\n")]
    count = len(pairs) // 5
    assert len(pairs) == 5 * count and len(dict(pairs)) == len(set(pairs)) == count
    assert len(dict(pairs[:count])) == count  # each is said before it is said again
    sizes.add(count)
  assert {len(text.split()[2]) for text in lists} == {len("1234567."), 37}
  assert sizes == {1, 2, 3, 4, 5, 6}
  assert all("quiz" not in text for text in _write(tmp_path, haystack, "--facts=1")["train"])


def test_what_is_written_is_a_corpus_with_splits_of_its_own(tmp_path, haystack):
  found = _write(tmp_path, haystack, "--kinds=niah_single_1")
  cfg = default.get_config().data
  cfg.path, cfg.tokenizer, cfg.cache = str(tmp_path / "needles"), "byte", str(tmp_path / "cache")
  dataset = data.load_text(cfg)
  assert dataset.train.num_documents == 60 and dataset.test.num_documents == 3
  assert data.text(dataset.test, dataset.tokenizer).decode() == "".join(found["test"])


def test_a_haystack_may_be_one_split_of_a_text(haystack):
  assert essays.load(str(haystack), "test").words[:3] == ["ant", "bee", "fly."]
  assert len(essays.load(str(haystack)).words) == 3 * len(essays.load(str(haystack), "test").words)


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--documents=0"], "--documents=0 is given; accepted is at least 1"),
    (["--facts=1.5"], "--facts=1.5 is given; accepted is from 0 to 1"),
    (["--most=500"], "--most=500 is given; accepted is at least 512"),
    (["--most=300", "--least=300"], "length=300 is too short for niah_single_1; accepted is at"),
    (["--kinds=sums"], "kind 'sums' is unknown; accepted are niah_single_1"),
    (["--haystack=/nowhere"], "'/nowhere' does not exist"),
    (["--words=/nowhere"], "nowhere/adjectivelist.txt is not a list of words"),
  ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, haystack, flags, words, capsys):
  argv = ["needle_text", f"--to={tmp_path / 'to'}", f"--haystack={haystack}", *flags]
  assert needle_text.main(argv) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and err.count("\n") == 1 and words in err
  assert not (tmp_path / "to").exists()

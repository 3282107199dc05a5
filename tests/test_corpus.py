"""Where text comes from: every kind of source, its splits, and one sentence per bad input."""

import gzip
import json
import random
import sys
import sysconfig
import tracemalloc

import pytest
import zstandard

from experiments import corpus
from experiments.errors import UserError

LINES = [json.dumps({"text": f"document {i}\nof the corpus"}).encode() for i in range(200)]


def write_tree(root, files):
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(root)


def by_split(path, **kwargs):
  result = {split: [] for split in corpus.SPLITS}
  for split, text in corpus.open_corpus(str(path), **kwargs).documents():
    result[split].append(text)
  return result


def texts_of(found):
  return [text for texts in found.values() for text in texts]


def test_standard_library_skips_tests_and_long_files():
  found = corpus.standard_library()
  assert len(found.files) > 300
  for file in found.files:
    assert file.name.endswith(".py")
    assert not corpus.STDLIB_SKIP & set(file.name.split("/"))
    assert file.path.stat().st_size <= corpus.STDLIB_MAX_BYTES
  assert "pydoc_data/topics.py" not in {f.name for f in found.files}
  assert sys.version.split()[0] in found.name


def test_standard_library_splits_by_file_with_near_copies_in_train():
  files = corpus.standard_library().files
  assert len({f.name for f in files}) == len(files)
  size = dict.fromkeys(corpus.SPLITS, 0)
  for file in files:
    size[file.split] += file.path.stat().st_size
    if file.name.split("/")[0] in corpus.STDLIB_FAMILIES:
      assert file.split == "train"
  total = sum(size.values())
  for split in ("validation", "test"):
    # A tenth, overshot by the last file at most.
    assert total / 10 <= size[split] <= total / 10 + corpus.STDLIB_MAX_BYTES
  assert any(f.name.startswith("encodings/") for f in files)


def test_standard_library_is_the_same_every_time():
  first, second = corpus.open_corpus(""), corpus.open_corpus("")
  assert first == second
  assert first.fingerprint() == second.fingerprint()


def test_a_python_without_sources_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
  with pytest.raises(UserError, match="holds no sources of the standard library; set data"):
    corpus.open_corpus("")


def test_folder_is_read_recursively_and_split_by_file(tmp_path):
  files = {f"part{i % 3}/{i}.{kind}": f"text {i}\n" for i, kind in enumerate(["txt", "md"] * 50)}
  found = by_split(write_tree(tmp_path, files))
  assert sorted(texts_of(found)) == sorted(files.values())
  assert [len(found[s]) for s in corpus.SPLITS] == pytest.approx([80, 10, 10], abs=2)
  assert found == by_split(tmp_path)


def test_split_depends_on_names_not_on_where_the_folder_is(tmp_path):
  files = {f"{i}.txt": "same size" for i in range(30)}
  here, there = (write_tree(tmp_path / n, files) for n in ("here", "there"))
  splits = [[(f.name, f.split) for f in corpus.open_corpus(p).files] for p in (here, there)]
  assert splits[0] == splits[1]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1000, 1, 1, 1), (1, 1000, 1), (5, 1, 1, 1, 900)])
def test_every_split_gets_a_file_however_sizes_differ(tmp_path, sizes):
  found = by_split(write_tree(tmp_path, {f"{i}.txt": "x" * n for i, n in enumerate(sizes)}))
  assert all(found.values())
  assert sum(map(len, found.values())) == len(sizes)


def test_hidden_empty_and_binary_files_are_left_out(tmp_path, caplog):
  good = {f"{i}.txt": f"text {i}" for i in range(5)}
  bad = {
    "logo.png": b"\x89PNG\r\n\x00\x00",
    "latin.txt": "naïve".encode("latin-1"),
    "empty.txt": "",
  }
  path = write_tree(tmp_path, good | bad | {".git/config": "hidden", ".env": "hidden"})
  with caplog.at_level("WARNING", logger="absl"):
    found = by_split(path)
  assert sorted(texts_of(found)) == sorted(good.values())
  assert "skipped 2 files" in caplog.text


def test_text_is_kept_as_it_is_but_for_the_byte_order_mark(tmp_path):
  (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo \ufeff\tthree\n\n".encode())
  assert "".join(texts_of(by_split(tmp_path / "a.txt"))) == "one\r\ntwo \ufeff\tthree\n\n"


def test_a_character_across_the_sniffed_block_is_text(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"x" * ((1 << 13) - 1) + "é".encode())
  assert corpus.open_corpus(str(tmp_path)).files


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "dev"])
def test_split_folders_are_the_splits(tmp_path, validation):
  files = {"train/a.txt": "a", f"{validation}/b.txt": "b", "test/sub/c.txt": "c", "README": "no"}
  found = by_split(write_tree(tmp_path, files))
  assert found == {"train": ["a"], "validation": ["b"], "test": ["c"]}


@pytest.mark.parametrize("given", ["validation", "test"])
def test_a_missing_held_out_folder_is_replaced_by_the_other(tmp_path, given, caplog):
  found = by_split(write_tree(tmp_path, {"train/a.txt": "a", f"{given}/b.txt": "b"}))
  assert found == {"train": ["a"], "validation": ["b"], "test": ["b"]}
  assert "serve as both" in caplog.text


@pytest.mark.parametrize(
  "names",
  [
    ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
    ("train-0.txt", "dev_0.txt", "TEST.txt"),
    ("a/train.txt", "b/val.txt", "b/c/test.txt"),
  ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_files_that_all_say_their_split_are_believed(tmp_path, names, listed):
  path = write_tree(tmp_path, dict(zip(names, "abc")))
  found = by_split(",".join(f"{path}/{name}" for name in names) if listed else path)
  assert found == {"train": ["a"], "validation": ["b"], "test": ["c"]}


def test_a_program_with_a_file_named_test_has_no_splits_of_its_own(tmp_path):
  files = {f"{name}.py": name for name in ("train", "test", "model", "data", "loss")}
  found = by_split(write_tree(tmp_path, files))
  assert sorted(texts_of(found)) == sorted(files.values())
  assert [len(found[s]) for s in corpus.SPLITS] == [3, 1, 1]


def test_a_folder_named_train_alone_splits_nothing(tmp_path):
  found = by_split(write_tree(tmp_path, {f"train/{i}.txt": str(i) for i in range(10)}))
  assert all(found.values())


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_single_file_is_cut_by_position_at_line_ends(tmp_path, end):
  text = "".join(f"line {i}\n" for i in range(1000)) + end
  (tmp_path / "input.txt").write_text(text)
  found = by_split(tmp_path / "input.txt")
  assert "".join(found[s][0] for s in corpus.SPLITS) == text
  assert all(found[s][0].endswith("\n") for s in corpus.SPLITS)
  assert [len(found[s][0]) / len(text) for s in corpus.SPLITS] == pytest.approx(
    [0.8, 0.1, 0.1], abs=0.01
  )


def test_a_single_line_is_cut_by_position_too(tmp_path):
  (tmp_path / "line.txt").write_text("0123456789")
  found = by_split(tmp_path / "line.txt")
  assert found == {"train": ["01234567"], "validation": ["8"], "test": ["9"]}


def test_a_list_of_files_keeps_equal_names_apart(tmp_path):
  write_tree(tmp_path, {f"{d}/x.txt": d for d in "abc"})
  found = by_split(",".join(str(tmp_path / d / "x.txt") for d in "abc"))
  assert sorted(texts_of(found)) == ["a", "b", "c"]
  assert all(found.values())


def test_a_path_with_a_comma_is_one_path(tmp_path):
  (tmp_path / "a,b.txt").write_text("0123456789")
  assert by_split(tmp_path / "a,b.txt")["train"] == ["01234567"]


def test_long_documents_are_cut_at_line_ends(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus, "MAX_DOCUMENT", 100)
  text = "".join(f"line {i}\n" for i in range(300)) + "z" * 250
  write_tree(tmp_path, {"train/a.txt": text, "test/b.txt": "b"})
  pieces = by_split(tmp_path)["train"]
  assert "".join(pieces) == text
  assert max(map(len, pieces)) <= 100
  assert sum(p.endswith("\n") for p in pieces) > 20


COMPRESS = {
  "a.jsonl": lambda data: data,
  "a.jsonl.gz": gzip.compress,
  "a.jsonl.zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("name", COMPRESS)
@pytest.mark.parametrize("parts", [1, 3])
def test_json_lines_in_one_or_several_frames(tmp_path, name, parts):
  size = -(-len(LINES) // parts)
  chunks = [b"\n".join(LINES[i : i + size]) for i in range(0, len(LINES), size)]
  chunks = [chunk + b"\n\n" for chunk in chunks[:-1]] + chunks[-1:]
  (tmp_path / name).write_bytes(b"".join(COMPRESS[name](chunk) for chunk in chunks))
  found = by_split(tmp_path / name)
  assert sorted(texts_of(found)) == sorted(json.loads(line)["text"] for line in LINES)
  assert [len(found[s]) / len(LINES) for s in corpus.SPLITS] == pytest.approx(
    [0.8, 0.1, 0.1], abs=0.07
  )


def test_json_lines_in_a_frame_with_a_long_window(tmp_path):
  parameters = zstandard.ZstdCompressionParameters(window_log=28, hash_log=10, chain_log=10)
  compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
  content = compressor.compress(b"\n".join(LINES)) + compressor.flush()
  (tmp_path / "a.jsonl.zst").write_bytes(content)
  assert len(texts_of(by_split(tmp_path / "a.jsonl.zst"))) == len(LINES)


def test_equal_json_lines_share_a_split_and_order_does_not_matter(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(b"\n".join(LINES + LINES[::-1]))
  found = by_split(tmp_path / "a.jsonl")
  for split in corpus.SPLITS:
    assert all(found[split].count(text) == 2 for text in found[split])


def test_json_lines_of_another_field_with_a_byte_order_mark(tmp_path):
  (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": 3, "body": "é"}'.encode())
  assert texts_of(by_split(tmp_path / "a.jsonl", text_field="body")) == ["é"]


@pytest.mark.parametrize("name", COMPRESS)
def test_json_lines_are_streamed(tmp_path, name):
  text = random.Random(0).randbytes(5_000_000).hex()
  lines = [json.dumps({"text": text[i : i + 5000]}).encode() for i in range(0, len(text), 5000)]
  (tmp_path / name).write_bytes(COMPRESS[name](b"\n".join(lines)))
  del text, lines
  tracemalloc.start()
  count = sum(1 for _ in corpus.open_corpus(str(tmp_path / name)).documents())
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert count == 2000
  assert peak < 2e6  # of 10 MB


def test_fingerprint_follows_content_names_and_field(tmp_path):
  path = write_tree(tmp_path, {f"{i}.txt": "text" for i in range(4)})
  seen = {corpus.open_corpus(path).fingerprint()}
  seen.add(corpus.open_corpus(path, "body").fingerprint())
  (tmp_path / "0.txt").write_text("longer text")
  seen.add(corpus.open_corpus(path).fingerprint())
  (tmp_path / "0.txt").rename(tmp_path / "9.txt")
  seen.add(corpus.open_corpus(path).fingerprint())
  assert len(seen) == 4


GZIP, ZSTD = gzip.compress(b"\n".join(LINES)), COMPRESS["a.jsonl.zst"](b"\n".join(LINES))
BAD_FILES = {
  "empty": ("a.txt", b"", r"a\.txt' holds no text"),
  "binary": ("a.txt", b"text\0", r"a\.txt is binary \(NUL at byte 4\)"),
  "latin-1": ("a.txt", "naïve".encode("latin-1"), r"a\.txt is not utf-8 text \(byte 2"),
  "no JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text": ', r"a\.jsonl:3: not a line of JSON"),
  "no utf-8": ("a.jsonl", b'{"text": "a"}\n\xff\xfe', r"a\.jsonl:2: not a line of JSON \('utf-8'"),
  "nested": ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not a line of JSON"),
  "no object": ("a.jsonl", b'{"text": "a"}\n["text"]', r"a\.jsonl:2: no field 'text' .*no object"),
  "no field": ("a.jsonl", b'{"body": "a"}', r"a\.jsonl:1: no field 'text' .* has fields 'body'"),
  "no text": ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: field 'text' is int, not a text"),
  "surrogate": ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: .*surrogates not allowed"),
  "cut gzip": ("a.jsonl.gz", GZIP[:-20], r"a\.jsonl\.gz:\d+: truncated or corrupt"),
  "bad gzip": ("a.jsonl.gz", GZIP[:60] + b"?" + GZIP[61:], r"gz:\d+: truncated or corrupt"),
  "no gzip": ("a.jsonl.gz", LINES[0], r"a\.jsonl\.gz:1: truncated or corrupt"),
  "cut zstd": ("a.jsonl.zst", ZSTD[:-9], r"a\.jsonl\.zst:\d+: truncated or corrupt"),
  "no zstd": ("a.jsonl.zst", LINES[0], r"a\.jsonl\.zst:1: truncated or corrupt"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_one_sentence(tmp_path, case):
  name, content, message = BAD_FILES[case]
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message) as e:
    by_split(tmp_path / name)
  assert "\n" not in str(e.value)


def test_text_that_turns_out_binary_in_a_folder_is_named(tmp_path):
  path = write_tree(tmp_path, {f"{i}.txt": b"x" * 10_000 + b"\xff" for i in range(3)})
  with pytest.raises(UserError, match=r"\d\.txt is not utf-8 text \(byte 10000"):
    by_split(path)


def test_a_file_that_vanishes_is_named(tmp_path):
  found = corpus.open_corpus(write_tree(tmp_path, {f"{i}.txt": "x" for i in range(3)}))
  (tmp_path / "1.txt").unlink()
  with pytest.raises(UserError, match=r"1\.txt cannot be read"):
    list(found.documents())


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("{}/absent", r"data.path: '.*/absent' does not exist"),
    ("{}/a.txt,{}/absent.txt", r"data.path: '.*/absent\.txt' does not exist"),
    ("{}/a.txt,{}/folder", r"'.*/folder' is a folder; a list may name files only"),
    ("{}/folder", r"'.*/folder' holds no text"),
  ],
)
def test_bad_paths_are_one_sentence(tmp_path, path, message):
  write_tree(tmp_path, {"a.txt": "text"})
  (tmp_path / "folder").mkdir()
  with pytest.raises(UserError, match=message):
    corpus.open_corpus(path.replace("{}", str(tmp_path)))

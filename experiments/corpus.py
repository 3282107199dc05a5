"""Where text comes from: the standard library's own sources, folders, files and JSON lines.

A corpus is a list of files; `documents()` streams it as (split, text) pairs, always in the same
order. Splits are made so that no held-out document is trained on:

* a folder with train/ and validation/ (val, valid, dev) and/or test/ has its splits already, and so
  have files that all say theirs: wiki.train.tokens and wiki.test.tokens, train.jsonl and val.jsonl;
* text files are ordered by the hash of their relative path: the first tenth of the corpus (in
  bytes) is the test split, the second tenth validation, the rest is trained on (each has a file);
* one or two text files are cut by position instead: 80 / 10 / 10 percent, at line ends;
* JSON lines go by the hash of their text, 80 / 10 / 10 percent, so exact copies stay together.
"""

import bisect
import codecs
import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import zstandard
from absl import logging

from experiments.errors import UserError

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
  "train": "train",
  "validation": "validation",
  "val": "validation",
  "valid": "validation",
  "dev": "validation",
  "test": "test",
}
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")

# Longer documents are cut at line ends into several, which bounds what a tokenizer holds at once.
MAX_DOCUMENT = 1 << 20  # characters

STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
STDLIB_MAX_BYTES = 1 << 18  # leaves out pydoc_data/topics.py: 0.76 MB of generated help text
# The files of these folders copy each other or modules elsewhere, so all of them are trained on:
# 120 code tables, four compilers, the fixers and a second tokenizer.
STDLIB_FAMILIES = {"encodings", "distutils", "lib2to3"}

# Part of the fingerprint: a change of the rules above must not find token files made by old ones.
RULES = 1


class File(NamedTuple):
  """A file of a corpus; `split` is "" where the file is split inside."""

  path: pathlib.Path
  name: str  # relative to the corpus, with forward slashes
  split: str


class Document(NamedTuple):
  """A text and the split it belongs to."""

  split: str
  text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A named list of files, streamed as documents."""

  name: str
  files: tuple[File, ...]
  text_field: str = "text"

  def fingerprint(self) -> str:
    """Hash of every name, size and time of change: equal means unchanged, without reading it."""
    stats = [(f.name, f.split, (s := f.path.stat()).st_size, s.st_mtime_ns) for f in self.files]
    key = json.dumps([RULES, self.text_field, stats])
    return hashlib.sha256(key.encode()).hexdigest()

  def documents(self) -> Iterator[Document]:
    """Streams the documents, none of them empty; a bad file or line raises UserError with it."""
    for file in self.files:
      try:
        for split, text in _read(file, self.text_field):
          for piece in _pieces(text):
            yield Document(split, piece)
      except OSError as e:
        raise UserError(f"{file.path} cannot be read: {e}") from None


def open_corpus(path: str = "", text_field: str = "text") -> Corpus:
  """Finds the corpus at `path`: "" is the standard library; else a folder or a list of files.

  Args:
    path: a folder (read recursively, hidden and binary files skipped), a file, or files separated
      by commas; `.jsonl`, `.jsonl.gz` and `.jsonl.zst` are JSON lines, all else is utf-8 text.
    text_field: the field of a JSON line that holds its text.

  Raises:
    UserError: the path does not exist or holds no text.
  """
  if not path:
    return standard_library()
  paths = [path] if os.path.exists(path) else [p.strip() for p in path.split(",")]
  paths = [pathlib.Path(p).expanduser() for p in paths]
  for p in paths:
    if not p.exists():
      raise UserError(f"data.path: {str(p)!r} does not exist")
  if len(paths) == 1 and paths[0].is_dir():
    files = _folder(paths[0])
  else:
    if folders := [str(p) for p in paths if p.is_dir()]:
      raise UserError(f"data.path: {folders[0]!r} is a folder; a list may name files only")
    root = os.path.commonpath([p.absolute().parent for p in paths])
    names = [p.absolute().relative_to(root).as_posix() for p in paths]
    files = _named_or_assigned([(p, n) for p, n in zip(paths, names) if p.stat().st_size])
  if not files:
    raise UserError(f"data.path: {path!r} holds no text")
  return Corpus(path, tuple(files), text_field)


def standard_library() -> Corpus:
  """The sources of the running Python's standard library, without its tests."""
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  found = [
    (path, name)
    for path, name in _walk(root, STDLIB_SKIP)
    # _sysconfigdata is written by the build and holds paths of the machine that built it.
    if name.endswith(".py") and not name.startswith("_sysconfigdata")
    if 0 < path.stat().st_size <= STDLIB_MAX_BYTES
  ]
  family = [(p, n) for p, n in found if n.split("/")[0] in STDLIB_FAMILIES]
  others = [(p, n) for p, n in found if n.split("/")[0] not in STDLIB_FAMILIES]
  if len(others) < len(SPLITS):
    raise UserError(f"{str(root)!r} holds no sources of the standard library; set data.path")
  extra = sum(path.stat().st_size for path, _ in family)
  files = [*_assign(others, extra), *(File(p, n, "train") for p, n in family)]
  name = f"standard library of {platform.python_implementation()} {platform.python_version()}"
  return Corpus(name, tuple(sorted(files, key=lambda f: f.name)))


def _walk(root: pathlib.Path, skip: set[str] = frozenset()) -> Iterator[tuple[pathlib.Path, str]]:
  """Yields (path, relative name) of every file that is not hidden, in sorted order."""
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = sorted(s for s in subfolders if s not in skip and not s.startswith("."))
    for name in sorted(n for n in names if not n.startswith(".")):
      path = pathlib.Path(folder, name)
      if path.is_file():
        yield path, path.relative_to(root).as_posix()


def _folder(root: pathlib.Path) -> list[File]:
  """The text files of a folder with their splits, by its subfolders where it has them."""
  found = [(p, n) for p, n in _walk(root) if p.stat().st_size]
  texts = [(p, n) for p, n in found if n.endswith(JSON_LINES) or _looks_like_text(p)]
  if skipped := len(found) - len(texts):
    logging.warning("%s: skipped %d files that are not utf-8 text", root, skipped)
  inside = [File(p, n, SPLIT_NAMES.get(n.split("/")[0], "")) for p, n in texts if "/" in n]
  return _named([file for file in inside if file.split]) or _named_or_assigned(texts)


def _named_or_assigned(found: list[tuple[pathlib.Path, str]]) -> list[File]:
  """Gives files the splits that all their names say, or by their hash."""
  words = [re.split(r"[/._-]", name.lower()) for _, name in found]
  splits = [next((SPLIT_NAMES[w] for w in ws if w in SPLIT_NAMES), "") for ws in words]
  files = [File(path, name, split) for (path, name), split in zip(found, splits)]
  return (_named(files) if all(splits) else []) or _assign(found)


def _named(files: list[File]) -> list[File]:
  """Files with a split each; none unless some are for training and some are not."""
  have = {file.split for file in files}
  if "train" not in have or len(have) == 1:
    return []
  for missing, other in (("validation", "test"), ("test", "validation")):
    if missing not in have:
      logging.warning("no files for %s: those for %s serve as both", missing, other)
      files = files + [file._replace(split=missing) for file in files if file.split == other]
  return files


def _assign(found: list[tuple[pathlib.Path, str]], extra: int = 0) -> list[File]:
  """Gives files their splits; JSON lines, and text files fewer than three, are split inside.

  Args:
    found: (path, relative name) of each file.
    extra: bytes of the corpus that are trained on besides.
  """
  texts = sorted(
    (file for file in found if not file[1].endswith(JSON_LINES)),
    key=lambda file: hashlib.sha256(os.fsencode(file[1])).digest(),
  )
  splits = {}
  if (count := len(texts)) >= len(SPLITS):
    sizes = list(itertools.accumulate(path.stat().st_size for path, _ in texts))
    tenth = (sizes[-1] + extra) / 10
    test = min(bisect.bisect_left(sizes, tenth) + 1, count - 2)
    validation = min(bisect.bisect_left(sizes, sizes[test - 1] + tenth) + 1, count - 1)
    for i, (_, name) in enumerate(texts):
      splits[name] = "test" if i < test else "validation" if i < validation else "train"
  return [File(path, name, splits.get(name, "")) for path, name in found]


def _read(file: File, text_field: str) -> Iterator[Document]:
  """Streams one file's documents, each with its split."""
  if file.name.endswith(JSON_LINES):
    for text in _json_lines(file.path, text_field):
      yield Document(file.split or _split_of(text), text)
  else:
    text = _text(file.path)
    yield from [Document(file.split, text)] if file.split else _by_position(text)


def _split_of(text: str) -> str:
  """The split of a text by its own hash."""
  bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 10
  return {0: "test", 1: "validation"}.get(bucket, "train")


def _by_position(text: str) -> Iterator[Document]:
  """Cuts a text after 80 and 90 percent of its characters, at a line end where one is near."""
  start = 0
  for split, percent in zip(SPLITS, (80, 90, 100)):
    end = len(text) * percent // 100
    end = text.find("\n", max(0, end - 1), end + len(text) // 20) + 1 or end
    yield Document(split, text[start:end])
    start = end


def _pieces(text: str) -> Iterator[str]:
  """Cuts a long text into documents of at most MAX_DOCUMENT characters, at line ends."""
  start = 0
  while len(text) - start > MAX_DOCUMENT:
    end = start + MAX_DOCUMENT
    end = text.rfind("\n", end - MAX_DOCUMENT // 2, end) + 1 or end
    yield text[start:end]
    start = end
  if start < len(text):
    yield text[start:]


def _looks_like_text(path: pathlib.Path) -> bool:
  """Whether a file's first bytes are utf-8 without a NUL."""
  with path.open("rb") as f:
    head = f.read(1 << 13)
  try:
    codecs.getincrementaldecoder("utf-8")().decode(head)  # a cut last character is no error
  except UnicodeDecodeError:
    return False
  return b"\0" not in head


def _text(path: pathlib.Path) -> str:
  """A whole text file as it is, line ends included, without a byte-order mark."""
  data = path.read_bytes()
  if b"\0" in data:
    raise UserError(f"{path} is binary (NUL at byte {data.index(0)}); utf-8 text is accepted")
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise UserError(f"{path} is not utf-8 text (byte {e.start}: {e.reason})") from None


def _json_lines(path: pathlib.Path, field: str) -> Iterator[str]:
  """Streams the texts of a JSON-lines file; a malformed line raises UserError with its number."""
  number = 0
  try:
    for number, line in enumerate(_lines(path), 1):
      if not (line := line.strip()):
        continue
      record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
      if not isinstance(record, dict) or field not in record:
        given = (
          f"fields {', '.join(map(repr, record))}" if isinstance(record, dict) else "no object"
        )
        raise UserError(
          f"{path}:{number}: no field {field!r} (data.text_field), the line has {given}"
        )
      if not isinstance(text := record[field], str):
        raise UserError(f"{path}:{number}: field {field!r} is {type(text).__name__}, not a text")
      text.encode()  # an escaped lone surrogate is valid JSON but no text
      yield text
  except UserError:
    raise
  except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as e:
    raise UserError(f"{path}:{number + 1}: truncated or corrupt file ({e})") from None
  except (ValueError, RecursionError) as e:
    raise UserError(f"{path}:{number}: not a line of JSON ({e})") from None


def _lines(path: pathlib.Path) -> Iterator[bytes]:
  """Streams the lines of a plain, gzip or zstandard file."""
  if path.suffix == ".zst":
    pending = b""
    for block in _zstandard_blocks(path):
      *lines, pending = (pending + block).split(b"\n")
      yield from lines
    yield pending
  else:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as f:
      yield from f


def _zstandard_blocks(path: pathlib.Path) -> Iterator[bytes]:
  """Decompresses frame by frame, because zstandard's own stream reader ends quietly when cut."""
  decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # also `zstd --long=31`
  frame = None
  with path.open("rb") as f:
    while block := f.read(1 << 14):  # small, since what comes out is many times larger
      while block:
        frame = frame or decompressor.decompressobj()
        yield frame.decompress(block)
        block = frame.unused_data if frame.eof else b""
        frame = None if frame.eof else frame
  if frame is not None:
    raise EOFError("the last zstandard frame is not complete")

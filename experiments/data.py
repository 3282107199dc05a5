"""Training data: token files prepared once, then random-access windows of them through grain.

    dataset = data.load(config.data)
    batches = data.loader(dataset.train, seq_len=1024, batch_size=8, seed=0)
    batch = next(batches)     # tokens, targets, segment_ids, weights: [8, 1024]

`python -m experiments.data --config=FILE` prepares a config's token files and prints their sizes.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grain
import numpy as np
import tabulate
from absl import logging

from experiments import corpus as corpus_lib
from experiments import tasks, tokenise
from experiments.corpus import SPLITS
from experiments.errors import UserError
from experiments.tokenfile import TokenFile, TokenWriter

ENCODE_BATCH = 1 << 22  # characters tokenised at a time
FOR_EVER = 1 << 48  # rows; grain's own endless length overflows in batches of one


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A tokenizer and three token files."""

  tokenizer: tokenise.Tokenizer
  train: TokenFile
  validation: TokenFile
  test: TokenFile

  @property
  def splits(self) -> dict[str, TokenFile]:
    return {split: getattr(self, split) for split in SPLITS}

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  @property
  def token_bytes(self) -> np.ndarray:
    """Bytes of text of each token, [vocab_size]."""
    return tokenise.token_bytes(self.tokenizer)

  @property
  def identity(self) -> dict[str, str]:
    """What a checkpoint must agree on besides the config."""
    header = self.train.header
    return {"corpus": header.corpus_digest, "tokenizer": header.tokenizer_digest}


class Split(Protocol):
  """What a loader reads: anything that gives rows."""

  def rows(self, seq_len: int, packing: str, align: int) -> Any:
    """Random access to dicts of [seq_len] arrays: `len()`, `[i]`, and `blank()` for padding."""


def load(config) -> Dataset | tasks.TaskDataset:
  """The data of a config's data section: its task, or text when there is none (see load_text)."""
  return tasks.load(config) if config.task else load_text(config)


def load_text(config) -> Dataset:
  """Opens the token files of a config's data section, preparing them first when absent.

  Prepared files lie in `config.cache`, in a folder named after a hash of everything that they
  depend on: the corpus's files (names, sizes, times of change), the tokenizer and its size.

  Args:
    config: `path` (see corpus.open_corpus; or a token file, `.tok`, or a folder of three prepared
      ones), `text_field`, `tokenizer` ("bpe", "byte" or the path of a tokenizer.json),
      `vocab_size` (of a BPE) and `cache` (a folder).

  Raises:
    UserError: a path, a line, a tokenizer or a token file is bad, or a split has no document; or
      the config names a task, which has no text.
  """
  if config.task:
    raise UserError(f"data.task={config.task!r} has no text; accepted here is '' (text)")
  path = pathlib.Path(config.path or "-").expanduser()
  if path.suffix == ".tok" or (path / "train.tok").is_file():
    return _load_ready(path, config)
  kind, name = _tokenizer_kind(config)
  corpus = corpus_lib.open_corpus(config.path, config.text_field)
  key = hashlib.sha256(json.dumps([corpus.fingerprint(), kind]).encode()).hexdigest()[:12]
  label = re.sub(r"\W+", "-", path.stem if config.path else "stdlib")[:40]
  folder = pathlib.Path(config.cache).expanduser() / f"{label}-{name}-{key}"
  paths = {split: folder / f"{split}.tok" for split in SPLITS}
  if not all(map(pathlib.Path.is_file, paths.values())):
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):  # the holder before us may have prepared them
      if not all(map(pathlib.Path.is_file, paths.values())):
        _prepare(corpus, config, name, folder)
  try:
    tokenizer = tokenise.load(folder / "tokenizer.json", name)
    return _open({split: TokenFile(path) for split, path in paths.items()}, tokenizer)
  except UserError as e:
    raise UserError(f"{e}; delete {folder} to prepare it again") from None


def text(token_file: TokenFile, tokenizer: tokenise.Tokenizer, limit: int | None = None) -> bytes:
  """The utf-8 text of a split's first documents, up to `limit` bytes, from its tokens."""
  stop = token_file.num_documents
  if limit is not None:
    stop = int(np.searchsorted(np.cumsum(token_file.document_bytes), limit)) + 1
  documents = map(token_file.document, range(min(stop, token_file.num_documents)))
  return b"".join(tokenizer.decode(d.tolist()).encode() for d in documents)[:limit]


def loader(
  split: Split,
  *,
  seq_len: int,
  batch_size: int,
  seed: int = 0,
  shuffle: bool = True,
  repeat: bool = True,
  packing: str = "documents",
  align: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  start: int = 0,
) -> grain.DatasetIterator:
  """Iterates over batches of a split's rows; its state is one integer, the next step.

  Step s is rows [s G, (s + 1) G) of the global order, G = batch_size * process_count, and process p
  gets the p-th block of batch_size of them. So the order does not depend on the number of
  processes, and a run resumes on another number of them as long as G stays the same.

  Args:
    split: a token file, or what else gives rows.
    seq_len: T, tokens per row.
    batch_size: rows per step of this process.
    seed: of the order of rows, which differs from epoch to epoch.
    shuffle: whether to shuffle, but for rows that say `in_order`; else they come in their order.
    repeat: whether to go on for ever; else the iterator ends after one epoch, and rows of padding
      (segment id 0, weight 0) fill the last step, so that nothing is dropped.
    packing: "documents" or "concat", see packing.Rows.
    align: 0, or C: documents start at multiples of C.
    process_index: of this process.
    process_count: processes in all.
    start: the step to start at.

  Returns:
    An iterator over dicts of [batch_size, T] arrays: `tokens`, `targets` (the next tokens),
    `segment_ids` (1.. per document in the row, 0 = padding), all int32, and `weights`, float32, 1
    where the target counts. `get_state()` is {"next_index": step}.
  """
  if batch_size < 1:
    raise UserError(f"batch_size={batch_size} rows per process; accepted is at least 1")
  if not 0 <= process_index < process_count:
    raise UserError(f"process_index={process_index} must be in [0, process_count={process_count})")
  rows = split.rows(seq_len, packing, align)
  dataset = grain.MapDataset.source(rows)
  if shuffle and not getattr(rows, "in_order", False):
    # grain adds the epoch to the seed: unhashed, seed 0's epoch 1 would be seed 1's epoch 0.
    hashed = hashlib.sha256(str(seed).encode()).digest()
    dataset = dataset.shuffle(seed=int.from_bytes(hashed[:4]))
  if repeat:
    dataset = dataset.repeat(-(-FOR_EVER // len(rows)))
  elif missing := -len(rows) % (batch_size * process_count):
    blanks = grain.MapDataset.source([rows.blank()] * missing)
    dataset = grain.MapDataset.concatenate([dataset, blanks])
  dataset = dataset.batch(batch_size)[process_index::process_count]
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  iterator = iter(dataset.to_iter_dataset(options))
  if start:
    iterator.set_state({"next_index": start})
  return iterator


def model_inputs(dataset: Any, packing: str, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays of a batch that a model is trained on.

  Without segment ids where text is one document throughout: the mixers need not look for restarts
  then, and what pads the end of the last row comes after all that counts.
  """
  if isinstance(dataset, Dataset) and packing == "concat":
    return {name: x for name, x in batch.items() if name != "segment_ids"}
  return batch


def _tokenizer_kind(config) -> tuple[list, str]:
  """What a cache key must hold of the tokenizer, and its name."""
  if config.tokenizer == "bpe":
    tokenise.check_vocab_size(config.vocab_size)
    return ["bpe", config.vocab_size], f"bpe-{config.vocab_size}"
  if config.tokenizer == "byte":
    return ["byte"], "byte"
  if not config.tokenizer.endswith(".json"):
    raise UserError(
      f"data.tokenizer={config.tokenizer!r}; accepted are 'bpe', 'byte' or a tokenizer.json's path"
    )
  path = pathlib.Path(config.tokenizer).expanduser()
  return ["json", tokenise.digest(tokenise.load(path))], re.sub(r"\W+", "-", path.stem)[:40]


def _prepare(corpus: corpus_lib.Corpus, config, name: str, folder: pathlib.Path) -> None:
  """Writes the tokenizer and the three token files; with less than three, `load` starts again."""
  logging.info("preparing %s in %s", corpus.name, folder)
  for leftover in folder.glob("*.partial"):  # of a process that was killed: we hold the lock
    leftover.unlink()
  if config.tokenizer == "bpe":
    train = (d.text for d in corpus.documents() if d.split == "train")
    tokenizer = tokenise.train_bpe(train, config.vocab_size)
  elif config.tokenizer == "byte":
    tokenizer = tokenise.ByteTokenizer()
  else:
    tokenizer = tokenise.load(pathlib.Path(config.tokenizer).expanduser(), name)
  tokenise.save(tokenizer, folder / "tokenizer.json")
  digest = hashlib.sha256()
  with contextlib.ExitStack() as stack:
    writers = {
      split: stack.enter_context(
        TokenWriter(
          folder / f"{split}.tok",
          vocab_size=tokenizer.vocab_size,
          separator=tokenizer.eos_id,
          tokenizer=name,
          tokenizer_digest=tokenise.digest(tokenizer),
          corpus=corpus.name,
        )
      )
      for split in SPLITS
    }
    for documents in _in_batches(corpus):
      encoded = tokenizer.encode_batch([d.text for d in documents])
      for document, tokens in zip(documents, encoded):
        data = document.text.encode()
        digest.update(b"%s %d\n" % (document.split.encode(), len(data)) + data)
        writers[document.split].append(tokens, len(data))
    counts = {split: len(writer.sizes) for split, writer in writers.items()}
    if empty := [split for split, count in counts.items() if not count]:
      raise UserError(
        f"{corpus.name!r} leaves the {empty[0]} split empty ({sum(counts.values())} documents in"
        " all): give more documents, or a folder with train/, validation/ and test/"
      )
    for writer in writers.values():
      writer.set_corpus_digest(digest.hexdigest())


def _in_batches(corpus: corpus_lib.Corpus) -> Iterator[list[corpus_lib.Document]]:
  """Groups the documents into lists of about ENCODE_BATCH characters."""
  batch, size = [], 0
  for document in corpus.documents():
    batch.append(document)
    size += len(document.text)
    if size >= ENCODE_BATCH:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _load_ready(path: pathlib.Path, config) -> Dataset:
  """Opens token files that somebody has prepared, with the tokenizer beside them.

  A folder must hold train.tok, validation.tok and test.tok; a single file's documents are split in
  their order, 80 / 10 / 10 percent.
  """
  folder = path if path.is_dir() else path.parent
  beside = folder / "tokenizer.json"
  tokenizer_path = config.tokenizer if config.tokenizer.endswith(".json") else beside
  if path.is_dir():
    files = {split: TokenFile(folder / f"{split}.tok") for split in SPLITS}
  else:
    count = TokenFile(path).num_documents
    if count < 10:
      raise UserError(f"{path} has {count} documents; splitting it takes at least 10")
    first, second = count * 8 // 10, count * 9 // 10
    ranges = slice(0, first), slice(first, second), slice(second, count)
    files = {s: TokenFile(path, documents=r, verify=False) for s, r in zip(SPLITS, ranges)}
  if config.tokenizer == "byte":
    return _open(files, tokenise.ByteTokenizer())
  return _open(files, tokenise.load(tokenizer_path, files["train"].header.tokenizer))


def _open(files: dict[str, TokenFile], tokenizer: tokenise.Tokenizer) -> Dataset:
  """Checks that the token files were made with this tokenizer."""
  for file in files.values():
    if file.header.tokenizer_digest != tokenise.digest(tokenizer):
      raise UserError(
        f"{file.path} was made with another tokenizer ({file.header.tokenizer}) than the one given"
        f" ({tokenizer.name})"
      )
  return Dataset(tokenizer, **files)


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
  """Lets one process of a machine prepare while the others wait; a killed one lets go."""
  with (folder / ".lock").open("w") as f:
    fcntl.flock(f, fcntl.LOCK_EX)
    yield


def main(config) -> None:
  """Prepares a config's token files and prints a table of them."""
  dataset = load_text(config.data)
  header = dataset.train.header
  print(f"{header.corpus} (sha256 {header.corpus_digest[:12]}), tokenizer {header.tokenizer}")
  table = [
    [split, f.num_documents, f.num_tokens, f.num_bytes, f.num_bytes / f.num_tokens]
    for split, f in dataset.splits.items()
  ]
  columns = ["split", "documents", "tokens", "bytes", "bytes/token"]
  print(tabulate.tabulate(table, columns, intfmt=",", floatfmt=".3f"))


def run_command(command: Callable[[Any], None]) -> int:
  """Calls command(config) for the command line; a UserError is one sentence and exit code 2."""
  from experiments import config  # which imports this module

  try:
    command(config.parse(sys.argv))
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(run_command(main))

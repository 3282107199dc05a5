"""The token file: one split's tokens on disk, checked on opening and mapped into memory.

    bytes 0..4095        header: one line of JSON, padded with spaces
    then                 tokens: uint16 or uint32, little-endian, padded to 8 bytes
    then                 offsets: int64 [documents + 1]
    then                 document sizes in utf-8 bytes: int64 [documents]

The tokens are one stream with a separator (the tokenizer's end of document) before, between and
after the documents: `sep d0 sep d1 sep ... sep`. So every token but the first separator is
somebody's target, and the tokens and the targets of any stretch are two slices of the stream.
Document i is `tokens[offsets[i] + 1 : offsets[i + 1]]`; offsets are those of the separators.

The checksum is CRC-32 over everything behind the header and then over the header's other fields.
It is computed while writing and verified on opening, together with the largest token id, in one
pass at about the speed of the disk: any flipped bit is noticed before it is trained on.
"""

import array
import contextlib
import dataclasses
import json
import os
import pathlib
import zlib

import numpy as np

from experiments.errors import UserError
from experiments.packing import Rows

FORMAT = "trellis-tokens"
VERSION = 1
HEADER_BYTES = 4096
BLOCK = 1 << 24  # bytes verified at a time


@dataclasses.dataclass(frozen=True)
class Header:
  """What a token file says of itself."""

  vocab_size: int
  dtype: str  # of the tokens
  num_documents: int
  num_tokens: int  # of the stream, the separators included
  num_bytes: int  # of the text in utf-8, the separators not included
  separator: int  # token id
  tokenizer: str  # its name
  tokenizer_digest: str
  corpus: str  # its name
  corpus_digest: str

  def to_bytes(self, checksum: int) -> bytes:
    fields = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
    line = json.dumps(fields | {"checksum": checksum}, separators=(",", ":")).encode()
    return line.ljust(HEADER_BYTES - 1) + b"\n"

  def checksum(self, payload_checksum: int) -> int:
    return zlib.crc32(json.dumps(dataclasses.asdict(self)).encode(), payload_checksum)

  def file_bytes(self) -> int:
    return self.offsets_at() + 8 * (2 * self.num_documents + 1)

  def offsets_at(self) -> int:
    end = HEADER_BYTES + self.num_tokens * np.dtype(self.dtype).itemsize
    return end + -end % 8


class TokenWriter:
  """Writes a token file document by document; nothing is seen at `path` before it is complete.

  Use it as a context manager: the file appears on leaving it, or not at all if it is left by an
  exception. The tokens stream to disk; 16 bytes per document are held in memory.
  """

  def __init__(self, path, *, vocab_size, separator, tokenizer, tokenizer_digest, corpus):
    self.path = pathlib.Path(path)
    self.vocab_size = int(vocab_size)
    self.separator = int(separator)
    # Names are cut so that the header holds them, whatever their characters.
    self.names = {"tokenizer": tokenizer[:60], "tokenizer_digest": tokenizer_digest}
    self.names |= {"corpus": corpus[:200], "corpus_digest": ""}
    self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    self.offsets = array.array("q", [0])
    self.sizes = array.array("q")
    self._crc = 0
    self._partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
    self._file = self._partial.open("wb")
    self._file.write(bytes(HEADER_BYTES))
    self._write(np.array([separator], self.dtype))

  def append(self, tokens, num_bytes: int) -> None:
    """Adds a document of `num_bytes` utf-8 bytes; raises UserError for an id that is no token's."""
    tokens = np.asarray(tokens, np.int64)
    if not tokens.size:
      return
    if (bad := tokens[(tokens < 0) | (tokens >= self.vocab_size)]).size:
      raise UserError(f"token id {bad[0]} is outside the vocabulary of {self.vocab_size} tokens")
    self._write(np.append(tokens, self.separator).astype(self.dtype))
    self.offsets.append(self.offsets[-1] + tokens.size + 1)
    self.sizes.append(num_bytes)

  def set_corpus_digest(self, digest: str) -> None:
    self.names["corpus_digest"] = digest

  def __enter__(self) -> "TokenWriter":
    return self

  def __exit__(self, kind, error, trace) -> None:
    try:
      if kind is None:
        self._finish()
    finally:
      self._file.close()
      with contextlib.suppress(FileNotFoundError):
        self._partial.unlink()

  def _finish(self) -> None:
    header = Header(
      vocab_size=self.vocab_size,
      dtype=self.dtype.name,
      num_documents=len(self.sizes),
      num_tokens=self.offsets[-1] + 1,
      num_bytes=sum(self.sizes),
      separator=self.separator,
      **self.names,
    )
    if not header.num_documents:
      raise UserError(f"{self.path} would hold no document")
    self._write(np.zeros(-self._file.tell() % 8, np.uint8))
    self._write(np.array(self.offsets, "<i8"))
    self._write(np.array(self.sizes, "<i8"))
    self._file.seek(0)
    self._file.write(header.to_bytes(header.checksum(self._crc)))
    self._file.flush()
    os.fsync(self._file.fileno())  # the data must be on disk before the name is
    os.replace(self._partial, self.path)

  def _write(self, values: np.ndarray) -> None:
    data = values.tobytes()
    self._crc = zlib.crc32(data, self._crc)
    self._file.write(data)


class TokenFile:
  """A token file opened for reading, or the documents `first..last-1` of one.

  Attributes:
    header: what the file says of itself.
    tokens: [num_tokens] the stream, mapped: reading a stretch reads only that stretch.
    offsets: int64 [documents + 1] of the separators in `tokens`.
    document_bytes: int64 [documents] utf-8 sizes.
  """

  def __init__(self, path, *, documents: slice = slice(None), verify: bool = True):
    """Opens and checks `path`.

    Args:
      path: the file.
      documents: a contiguous range of its documents.
      verify: whether to read the whole file once for its checksum, not only its header and size.

    Raises:
      UserError: it does not exist, is no token file, of another version, truncated or corrupt.
    """
    self.path = pathlib.Path(path)
    self.header, checksum = _read_header(self.path)
    size, expected = self.path.stat().st_size, self.header.file_bytes()
    if size != expected:
      what = "truncated" if size < expected else "too long"
      raise UserError(f"{path} is {what}: {size:,} bytes, its header says {expected:,}")
    if verify:
      _verify(self.path, self.header, checksum)
    h = self.header
    data = np.asarray(np.memmap(self.path, np.uint8, "r"))
    tokens = data[HEADER_BYTES:][: h.num_tokens * np.dtype(h.dtype).itemsize].view(h.dtype)
    numbers = data[h.offsets_at() :].view("<i8")
    first, last, _ = documents.indices(h.num_documents)
    offsets = numbers[first : last + 1]
    self.tokens = tokens[offsets[0] : offsets[-1] + 1]
    self.offsets = np.asarray(offsets - offsets[0])
    self.document_bytes = np.asarray(numbers[h.num_documents + 1 :][first:last])
    self._documents = documents

  def __reduce__(self):
    # A mapped array would be pickled as a copy of all tokens; another process maps it anew.
    return _reopen, (self.path, self._documents)

  @property
  def num_documents(self) -> int:
    return len(self.document_bytes)

  @property
  def num_tokens(self) -> int:
    """Tokens of the stream, the separators included."""
    return len(self.tokens)

  @property
  def num_bytes(self) -> int:
    """Bytes of the text in utf-8."""
    return int(self.document_bytes.sum())

  def document(self, i: int) -> np.ndarray:
    """The tokens of document i, without separators."""
    return self.tokens[self.offsets[i] + 1 : self.offsets[i + 1]]

  def rows(self, seq_len: int, packing: str = "documents", align: int = 0) -> Rows:
    """Random access to the rows of `seq_len` positions that the documents are packed into."""
    return Rows(self, seq_len, packing, align)


def _reopen(path, documents) -> TokenFile:
  return TokenFile(path, documents=documents, verify=False)


def _read_header(path: pathlib.Path) -> tuple[Header, int]:
  """Reads and checks the header alone; returns it with the file's checksum."""
  if not path.is_file():
    raise UserError(f"token file {str(path)!r} does not exist")
  with path.open("rb") as f:
    line = f.read(HEADER_BYTES)
  if not line.startswith(b'{"format":"%s"' % FORMAT.encode()):
    raise UserError(f"{path} is not a token file")
  try:
    fields = json.loads(line)
    version = fields.pop("version")
    checksum = fields.pop("checksum")
    del fields["format"]
    if version != VERSION:
      raise UserError(f"{path} has version {version}; this program reads version {VERSION}")
    header = Header(**fields)
    header.file_bytes()
  except UserError:
    raise
  except (ValueError, TypeError, KeyError) as e:
    what = "truncated" if len(line) < HEADER_BYTES else "corrupt"
    raise UserError(f"the header of {path} is {what} ({e})") from None
  return header, checksum


def _verify(path: pathlib.Path, header: Header, checksum: int) -> None:
  """Reads the whole file once for its checksum and its largest token id."""
  crc, largest, left = 0, 0, header.num_tokens
  itemsize = np.dtype(header.dtype).itemsize
  with path.open("rb") as f:
    f.seek(HEADER_BYTES)
    while block := f.read(BLOCK):
      crc = zlib.crc32(block, crc)
      if here := min(left, len(block) // itemsize):
        largest = max(largest, np.frombuffer(block, header.dtype, here).max())
        left -= here
  if header.checksum(crc) != checksum:
    raise UserError(f"{path} is corrupt: its checksum does not match its content")
  if largest >= header.vocab_size:
    raise UserError(
      f"{path} holds token id {largest}, its header allows a vocabulary of {header.vocab_size}"
    )

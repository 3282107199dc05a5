"""How the documents of a split become rows of T positions, by arithmetic alone."""

import numpy as np

from experiments.errors import UserError

PACKINGS = ("documents", "concat")


class Rows:
  """Random access to the rows of T positions into which a split's documents are packed.

  The documents stand one after the other on one long tape, which is cut every T positions; row i is
  the i-th piece. A document of n tokens takes n + 1 positions: its inputs start with the separator
  and its targets end with one, so every token and every end of document is a target exactly once.

  * "documents": every document, or piece of one, is a segment of its row, numbered from 1. With
    `align` = C, a document starts at a multiple of C on the tape, hence in its row. The gap before
    it holds separators with weight 0 and the segment id of the document that has ended: the op's
    chunk grid advances over a segment's positions only, and padding (id 0) is none.
  * "concat": the whole split is one document, so state flows across documents.

  Only the end of the last row is padding (segment id 0, weight 0). The plan is two numbers per
  document, so a row costs a binary search wherever it is.
  """

  def __init__(self, token_file, seq_len: int, packing: str, align: int = 0):
    """Plans the tape; raises UserError for an unknown packing or an align that does not fit."""
    if seq_len < 1:
      raise UserError(f"seq_len={seq_len}; accepted is at least 1")
    if packing not in PACKINGS:
      raise UserError(f"data.packing={packing!r}; accepted are {', '.join(PACKINGS)}")
    if align and packing != "documents":
      raise UserError(f"data.align={align} needs data.packing='documents', given {packing!r}")
    if align < 0 or (align and seq_len % align):
      raise UserError(f"data.align={align} must be 0 or divide seq_len={seq_len}")
    self.tokens = token_file.tokens
    self.separator = token_file.header.separator
    self.seq_len = seq_len
    # Where each document's separator is in the stream, and where on the tape.
    self.offsets = token_file.offsets if packing == "documents" else token_file.offsets[[0, -1]]
    lengths = np.diff(self.offsets)
    self.starts = np.zeros(len(lengths), np.int64)
    np.cumsum((lengths + -lengths % max(align, 1))[:-1], out=self.starts[1:])
    self.end = int(self.starts[-1] + lengths[-1])

  def __len__(self) -> int:
    return -(-self.end // self.seq_len)

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    at = np.arange(row * self.seq_len, min((row + 1) * self.seq_len, self.end))
    document = np.searchsorted(self.starts, at, side="right") - 1
    source = self.offsets[document] + at - self.starts[document]
    inside = source < self.offsets[document + 1]
    source = source[inside]
    result = self.blank()
    used = np.flatnonzero(inside)
    result["tokens"][used] = self.tokens[source]
    result["targets"][used] = self.tokens[source + 1]
    result["segment_ids"][: len(at)] = document - document[0] + 1
    result["weights"][used] = 1
    return result

  def blank(self) -> dict[str, np.ndarray]:
    """A row of padding."""
    return {
      "tokens": np.full(self.seq_len, self.separator, np.int32),
      "targets": np.full(self.seq_len, self.separator, np.int32),
      "segment_ids": np.zeros(self.seq_len, np.int32),
      "weights": np.zeros(self.seq_len, np.float32),
    }

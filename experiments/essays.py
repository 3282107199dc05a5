"""Running text as a haystack: its first words, and where its sentences end."""

import re

import numpy as np

from experiments import corpus
from experiments.errors import UserError

MAX_CHARACTERS = 1 << 23  # of a haystack: more than 128k words; longer ones repeat it
CLOSED = re.compile(r"[.!?]['\"\u2019\u201d)\]]*$")
ABBREVIATION = re.compile(r"^\W*([A-Z]|Mr|Mrs|Ms|Dr|St|Mme|Prof|Rev|Capt|Col|Gen|No|vs|etc)\.$")


class Essay:
  """The words of a text, which begins again where it ends."""

  def __init__(self, text: str):
    """Raises UserError for a text without words."""
    self.words = text.split()
    if not self.words:
      raise UserError("the haystack's text has no words")
    follows = [*self.words[1:], self.words[0]]
    # A sentence ends at a mark before a word that can begin one, and where the text does.
    self.ends = np.array(
      [
        bool(CLOSED.search(word)) and not ABBREVIATION.match(word) and not after[0].islower()
        for word, after in zip(self.words, follows)
      ]
    )
    self.ends[-1] = True

  def cut(self, count: int, depth: int, start: int = 0) -> tuple[str, str]:
    """`count` words, cut after `depth` percent of their sentences, rounded down.

    Args:
      count: of words.
      depth: 0 to 100.
      start: the first of them, less than there are.
    """
    repeats = -(-(start + count) // len(self.words))
    source = self.words if repeats == 1 else self.words * repeats
    words = source[start : start + count]
    ends = np.flatnonzero(np.tile(self.ends, repeats)[start : start + count][:-1]) + 1
    sentences = len(ends) + bool(count)
    before = sentences * depth // 100
    at = 0 if not before else count if before == sentences else int(ends[before - 1])
    return " ".join(words[:at]), " ".join(words[at:])


def load(path: str) -> Essay:
  """The text of a file or folder (see corpus.open_corpus), file after file by name."""
  found = corpus.open_corpus(path)
  found = corpus.Corpus(path, tuple(sorted(found.files, key=lambda f: f.name)), found.text_field)
  pieces, size = [], 0
  for document in found.documents():
    pieces.append(document.text)
    if (size := size + len(document.text)) >= MAX_CHARACTERS:
      break
  return Essay(" ".join(pieces))

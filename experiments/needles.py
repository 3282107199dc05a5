"""What RULER's single-needle samples say (Hsieh et al. 2024): what is hidden, and what is asked.

prompt   A special magic number is hidden within the following text. Make sure ...
         CONTEXT
         What is the special magic number for KEY mentioned in the provided text?
prefix    The special magic number for KEY mentioned in the provided text is
answer   7 digits, or a uuid

niah_single_1   lines of noise, a number
niah_single_2   the first words of an essay, a number
niah_single_3   the first words of an essay, a uuid
"""

import dataclasses
import pathlib
import uuid

import numpy as np

from experiments.errors import UserError

KINDS = {
  "niah_single_1": ("noise", "number"),
  "niah_single_2": ("essay", "number"),
  "niah_single_3": ("essay", "uuid"),
}
NEW_TOKENS = 128  # room for the answer
LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {value}s for {key} is: {answer}."
ABOUT = (
  "A special magic {value} is hidden within the following text. Make sure to memorize it. I will"
  " quiz you about the {value} afterwards.\n"
)
QUESTION = "\nWhat is the special magic {value} for {key} mentioned in the provided text?"
PREFIX = " The special magic {value} for {key} mentioned in the provided text is"
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)  # percent of the sentences

ADJECTIVES = """
  amber ancient bitter bold brave brisk broad calm clever cold cosmic crisp curious damp dapper
  eager early faint fancy fierce fond gentle giddy golden grand hasty hollow humble icy jolly keen
  lively lofty lucky mellow merry mighty misty modest noble odd pale plain proud quaint quick quiet
  rapid rare rustic shy silent silver sleepy sly smooth solid stern sturdy sunny swift tidy vivid
"""
NOUNS = """
  acorn anchor anvil apple arrow badger banjo barrel basket beacon bridge bucket button candle
  canyon carpet castle cedar chisel cliff clover comet compass cradle crystal dagger desert dragon
  eagle ember falcon feather fiddle forest garden glacier hammer harbor helmet island kettle ladder
  lantern magnet marble meadow mirror needle orchard otter paddle pebble pepper pillow puzzle river
  saddle shovel spider temple tunnel violin walnut window
"""


@dataclasses.dataclass(frozen=True)
class Sample:
  """A question and what answers it; `length` counts prompt, prefix and the tokens to generate."""

  kind: str
  prompt: str
  prefix: str
  answer: str
  length: int


def render(
  kind: str, key: str, answer: str, before: str, after: str, asked: bool = True
) -> tuple[str, str]:
  """(prompt, prefix) of a needle between two stretches of haystack.

  Args:
    kind: of KINDS.
    key, answer: of the needle; an empty answer is no needle.
    before, after: the haystack.
    asked: whether the prompt says what is hidden, and asks for it.
  """
  haystack, value = KINDS[kind]
  parts = [before, after]
  if answer:
    parts.insert(1, NEEDLE.format(value=value, key=key, answer=answer))
  # Lines of noise, none of them empty; an essay's stretches may be.
  context = "\n".join(filter(None, parts)) if haystack == "noise" else " ".join(parts)
  prefix = PREFIX.format(value=value, key=key)
  if not asked:
    return context, prefix
  return ABOUT.format(value=value) + context + QUESTION.format(value=value, key=key), prefix


def key(rng: np.random.Generator, words: tuple[list[str], list[str]]) -> str:
  """A key, "ADJECTIVE-NOUN" of the two lists."""
  return "-".join(names[rng.integers(len(names))] for names in words)


def value(rng: np.random.Generator, kind: str) -> str:
  """What a needle of a kind says: 7 digits, or a uuid. Draws both, whichever it is."""
  digits, random_uuid = rng.integers(10**6, 10**7), uuid.UUID(bytes=rng.bytes(16), version=4)
  return str(digits if KINDS[kind][1] == "number" else random_uuid)


def words_of(folder: str) -> tuple[list[str], list[str]]:
  """(adjectives, nouns) that keys are made of: a folder's two lists, or our own for ""."""
  if not folder:
    return ADJECTIVES.split(), NOUNS.split()
  lists = []
  for name in ("adjectivelist.txt", "nounlist.txt"):
    path = pathlib.Path(folder).expanduser() / name
    if not path.is_file() or not (found := path.read_text(encoding="utf-8").split()):
      raise UserError(f"{path} is not a list of words; accepted is a file with one a line")
    lists.append(found)
  return lists[0], lists[1]

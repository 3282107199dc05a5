"""Whether examples of associative recall follow the protocol of experiments/tasks/mqar.py.

    check(tokens, labels, vocab_size=8192, pairs=8)     # UserError names the first that does not

Two kinds of rules. Each example by itself: where its pairs and queries stand, which tokens they
are, what is asked. All of them together: keys, values and noise are uniform, slots follow the law,
no example comes twice. The second kind cannot be certain, so it refuses what a right generator
gives less than once in a million: for draws x_j without replacement with weights w, each has

    mean m_j = sum w_i s_i / sum w_i,   variance v_j = sum w_i s_i^2 / sum w_i - m_j^2

of a score s over what the earlier draws have left, so sum (s(x_j) - m_j) / sqrt(sum v_j) over all
draws of all examples is a standard normal, more nearly the more there are.
"""

import math

import numpy as np
from jaxtyping import Float, Int

from experiments.errors import UserError
from experiments.tasks import mqar

IGNORED = -100  # the label of what does not count
FAR = 5.0  # standard deviations, beyond which a right generator lies once in 1.7 million
FEW = 100  # draws, below which the sum is not normal enough to say anything


def labels_of(row: dict[str, np.ndarray]) -> Int[np.ndarray, "*B T"]:
  """The labels of our own rows: targets where they count."""
  return np.where(row["weights"] > 0, row["targets"], IGNORED)


def check(
  tokens: Int[np.ndarray, "N T"],
  labels: Int[np.ndarray, "N T"],
  *,
  vocab_size: int,
  pairs: int,
  blanks: int = 0,
  noise: bool = False,
  power: float = 0.01,
) -> None:
  """Raises UserError, naming the first violation, unless all examples follow the protocol."""
  tokens, labels = np.asarray(tokens), np.asarray(labels)
  for name, array in (("tokens", tokens), ("labels", labels)):
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
      raise UserError(
        f"{name} are {array.dtype} {list(array.shape)}; accepted are integers [examples, T]"
      )
  if tokens.shape != labels.shape or not tokens.size:
    raise UserError(
      f"tokens are {list(tokens.shape)} and labels {list(labels.shape)}; accepted is one shape of"
      " at least one example"
    )
  slots = mqar.slots(tokens.shape[1], blanks, pairs)
  keys, values = _pairs(tokens, vocab_size, pairs, blanks)
  drawn = _queries(tokens, labels, keys, values, blanks + 2 * pairs)
  _fillers(tokens, labels, blanks, pairs, vocab_size, noise)
  _no_repeats(tokens, vocab_size, pairs)
  half = vocab_size // 2
  _drawn_by("keys", keys - 1, np.ones(half - 1), np.arange(half - 1))
  _drawn_by("values", values - half, np.ones(vocab_size - half), np.arange(vocab_size - half))
  _drawn_by("slots", drawn, mqar.law(slots, power), np.log(np.arange(1, slots + 1)))


def slots_of(
  tokens: Int[np.ndarray, "N T"], labels: Int[np.ndarray, "N T"], pairs: int, blanks: int = 0
) -> Int[np.ndarray, "N K"]:
  """The slot of each key's query, from 0, in the order of the keys."""
  end = blanks + 2 * pairs
  at = np.nonzero(labels != IGNORED)[1].reshape(len(tokens), pairs)
  order = np.argsort(np.argsort(tokens[:, blanks:end:2], axis=1), axis=1)
  by_token = np.argsort(np.take_along_axis(tokens, at, 1), axis=1)
  return (np.take_along_axis(np.take_along_axis(at, by_token, 1), order, 1) - end) // 2


def _pairs(tokens, vocab_size, pairs, blanks):
  """The keys and values [N, K], which are of their halves and distinct."""
  half, end = vocab_size // 2, blanks + 2 * pairs
  _each(
    (tokens >= 0) & (tokens < vocab_size),
    lambda i, t: f"token {tokens[i, t]} at {t}; accepted are 0 .. {vocab_size - 1}",
  )
  keys, values = tokens[:, blanks:end:2], tokens[:, blanks + 1 : end : 2]
  for name, found, first, last in (("key", keys, 1, half - 1), ("value", values, half, None)):
    last = vocab_size - 1 if last is None else last
    _each(
      (found >= first) & (found <= last),
      lambda i, j: f"{name} {j} is {found[i, j]}; accepted are {first} .. {last}",
    )
    earlier = np.tril(found[:, :, None] == found[:, None, :], -1).any(-1)
    _each(~earlier, lambda i, j: f"{name} {found[i, j]} comes twice; accepted are distinct ones")
  return keys, values


def _queries(tokens, labels, keys, values, end):
  """The slots [N, K] of the queries, which ask for every key once and want its value."""
  pairs, asked = keys.shape[1], labels != IGNORED
  at = np.arange(tokens.shape[1])
  _each(
    ~asked | (at >= end)[None],
    lambda i, t: f"label {labels[i, t]} at {t}; accepted is {IGNORED} before {end}",
  )
  _each(
    ~asked | ((at - end) % 2 == 0)[None],
    lambda i, t: f"label {labels[i, t]} at {t}, the second token of a slot; accepted is {IGNORED}",
  )
  _each(
    (asked.sum(1) == pairs)[:, None],
    lambda i, _: f"{asked[i].sum()} labels other than {IGNORED}; accepted are {pairs}",
  )
  query = np.nonzero(asked)[1].reshape(len(tokens), pairs)
  token, label = (np.take_along_axis(x, query, 1) for x in (tokens, labels))
  match = token[:, :, None] == keys[:, None, :]
  _each(
    match.any(-1), lambda i, j: f"token {token[i, j]} at {query[i, j]} has a label but is no key"
  )
  _each(match.any(1), lambda i, j: f"key {keys[i, j]} is not asked for; accepted is once")
  wanted = np.take_along_axis(values, match.argmax(-1), 1)
  _each(
    label == wanted,
    lambda i, j: f"label {label[i, j]} at {query[i, j]}; the key's value is {wanted[i, j]}",
  )
  return slots_of(tokens, labels, pairs, end - 2 * pairs)


def _fillers(tokens, labels, blanks, pairs, vocab_size, noise):
  """What is no pair and no query is blank, or uniform noise."""
  filler = labels == IGNORED
  filler[:, blanks : blanks + 2 * pairs] = False
  if not noise:
    _each(
      ~filler | (tokens == mqar.BLANK),
      lambda i, t: f"token {tokens[i, t]} at {t} is no pair and no query; accepted is {mqar.BLANK}",
    )
  elif filler.any():
    _drawn_by("noise", tokens[filler][:, None], np.ones(vocab_size), np.arange(vocab_size))


def _each(right, words) -> None:
  """Raises UserError for the first (example, place) that is not right."""
  if not right.all():
    i, place = np.argwhere(~right)[0]
    raise UserError(f"example {i}: {words(i, place)}")


def _drawn_by(name, draws, weights, scores) -> None:
  """Raises UserError when the draws' mean score is not that of the law `weights`."""
  # The first ones by themselves too: sorting an example's draws changes no sum over all of them.
  for which, some in (("", draws), ("first ", draws[:, :1])):
    far = drift(some, weights, scores)
    if some.size >= FEW and abs(far) > FAR:
      raise UserError(
        f"the {which}{name} of all examples lie {far:+.1f} standard deviations from the protocol's"
        f" law; accepted are at most {FAR:g}"
      )


def drift(
  draws: Int[np.ndarray, "N K"], weights: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"]
) -> float:
  """How far the scores of draws without replacement lie from the law, in standard deviations."""
  moments = np.stack([weights * scores**p for p in range(3)])  # [3, n]
  taken = moments[:, draws]  # [3, N, K]
  left = moments.sum(1)[:, None, None] - (np.cumsum(taken, axis=-1) - taken)
  mean = left[1] / left[0]
  variance = np.maximum(left[2] / left[0] - mean**2, 0).sum()
  excess = (scores[draws] - mean).sum()
  return float(excess / math.sqrt(variance)) if variance > 0 else 0.0


def _no_repeats(tokens, vocab_size, pairs) -> None:
  """Raises UserError for an example that comes twice, where chance would not do that."""
  half = vocab_size // 2
  choices = math.perm(half - 1, pairs) * math.perm(vocab_size - half, pairs)
  distinct = len(np.unique(tokens, axis=0))
  if distinct < len(tokens) and choices > 10**6 * len(tokens) ** 2:
    raise UserError(
      f"{len(tokens) - distinct} of {len(tokens)} examples repeat others; accepted are distinct"
      " ones"
    )

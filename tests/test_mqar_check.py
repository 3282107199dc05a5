"""The checker of recall: Zoology's own examples pass, ours pass, broken ones do not."""

import json

import numpy as np
import pytest
from golden import golden

from experiments.errors import UserError
from experiments.tasks import mqar, mqar_check

GOLDEN = [(64, 4, 1), (64, 8, 2), (64, 16, 3), (128, 8, 4), (128, 32, 5), (256, 16, 6)]
V, L, K, N = 64, 40, 4, 200


def theirs(length, pairs, seed):
  """Inputs, labels and parameters of one of Zoology's files."""
  folder = golden("mqar_golden")
  name = f"V8192_L{length}_K{pairs}_P1_seed{seed}.npz"
  (about,) = [a for a in json.loads((folder / "manifest.json").read_text()) if a["file"] == name]
  with np.load(folder / name) as f:
    return f["inputs"].astype(np.int64), f["labels"].astype(np.int64), about


def ours(count=N, seq_len=L, **knobs):
  """Tokens and labels of our generator."""
  settings = dict(vocab_size=V, pairs=K, blanks=0, noise=False, power=0.01, seed=0)
  settings |= dict(train_examples=count, held_out_examples=count) | knobs
  rows = mqar.Rows(mqar.Config(**settings), "train", seq_len)
  examples = [rows[i] for i in range(count)]
  labels = np.stack([mqar_check.labels_of(row) for row in examples])
  return np.stack([row["tokens"] for row in examples]), labels


@pytest.mark.parametrize("length, pairs, seed", GOLDEN)
def test_the_published_examples_pass(length, pairs, seed):
  tokens, labels, about = theirs(length, pairs, seed)
  mqar_check.check(tokens, labels, vocab_size=about["vocab_size"], pairs=pairs)


@pytest.mark.parametrize("length, pairs, seed", GOLDEN)
def test_their_draws_in_our_layout_are_their_files_bit_for_bit(length, pairs, seed):
  """The same random stream, read in their order, through our law of slots and our layout."""
  inputs, labels, about = theirs(length, pairs, seed)
  rng, vocab, count = np.random.RandomState(seed), about["vocab_size"], len(inputs)
  slots = mqar.slots(length, 0, pairs)

  def draw(choices, p=None):
    return np.stack([rng.choice(choices, pairs, replace=False, p=p) for _ in range(count)])

  keys, values = draw(np.arange(1, vocab // 2)), draw(np.arange(vocab // 2, vocab))
  drawn = draw(np.arange(slots), mqar.law(slots, about["power_a"]))
  tokens, wanted = np.zeros_like(inputs), np.full_like(labels, mqar_check.IGNORED)
  for i in range(count):
    wanted[i, mqar.lay(tokens[i], keys[i], values[i], drawn[i])] = values[i]
  np.testing.assert_array_equal(tokens, inputs)
  np.testing.assert_array_equal(wanted, labels)
  np.testing.assert_array_equal(mqar_check.slots_of(inputs, labels, pairs), drawn)


@pytest.mark.parametrize("length, pairs, seed", GOLDEN)
def test_our_slots_are_distributed_as_theirs(length, pairs, seed):
  inputs, labels, about = theirs(length, pairs, seed)
  theirs_at = mqar_check.slots_of(inputs, labels, pairs)
  mine = ours(1000, length, vocab_size=about["vocab_size"], pairs=pairs)
  ours_at = mqar_check.slots_of(*mine, pairs)
  # The slots of the first half of the keys on a log scale, and how often each quarter of it is
  # asked; all keys together may fill all slots.
  scale = np.log2(1 + np.arange(mqar.slots(length, 0, pairs)))
  quarter = (scale / scale.max() * 3.999).astype(int)
  features = [scale] + [(quarter == q).astype(float) for q in range(4)]
  for feature in features:
    a, b = (feature[at][:, : pairs // 2].mean(1) for at in (theirs_at, ours_at))
    error = np.sqrt(a.var() / len(a) + b.var() / len(b))
    assert abs(a.mean() - b.mean()) < 4 * error


@pytest.mark.parametrize(
  "seq_len, knobs",
  [
    (L, {}),
    (4 * K, {}),
    (L, {"noise": True}),
    (L + 20, {"blanks": 20}),
    (L + 21, {"blanks": 21, "noise": True}),
    (L, {"power": 1.0}),
    (64, {"pairs": 16, "vocab_size": 34}),
    (8, {"pairs": 1, "vocab_size": 4}),
    (512, {"pairs": 64, "vocab_size": 8192}),
  ],
)
def test_every_example_of_ours_passes(seq_len, knobs):
  tokens, labels = ours(seq_len=seq_len, **knobs)
  knobs = {"vocab_size": V, "pairs": K} | knobs
  mqar_check.check(tokens, labels, **knobs)


def _end(b=0):
  return b + 2 * K


def _first_query(labels):
  return np.argmax(labels != -100, axis=1)


def broken():
  """Yields (words of the refusal, what to do to tokens and labels in place, what was promised)."""

  def put(where, at, value):
    def change(t, l):
      x = t if where == "tokens" else l
      x[3, at(t, l) if callable(at) else at] = value(t, l) if callable(value) else value

    return change

  query = lambda t, l: _first_query(l)[3]
  free = lambda t, l: (
    _end() + 2 * next(s for s in range(L // 2 - K) if l[3, _end() + 2 * s] == -100)
  )
  yield "example 3: token -1 at 30; accepted are 0", put("tokens", 30, -1)
  yield "example 3: token 64 at 30; accepted are 0 .. 63", put("tokens", 30, V)
  yield "example 3: key 1 is 0; accepted are 1 .. 31", put("tokens", 2, 0)
  yield "example 3: key 1 is 40; accepted are 1 .. 31", put("tokens", 2, 40)
  yield "comes twice; accepted are distinct", put("tokens", 2, lambda t, l: t[3, 0])
  yield "example 3: value 0 is 9; accepted are 32 .. 63", put("tokens", 1, 9)
  yield "example 3: value 0 is 0; accepted are 32", put("tokens", 1, 0)
  yield "comes twice; accepted are distinct", put("tokens", 3, lambda t, l: t[3, 1])
  yield "at 5; accepted is -100 before 8", put("labels", 5, 40)
  yield "the second token of a slot", put("labels", lambda t, l: free(t, l) + 1, 40)
  yield "3 labels other than -100; accepted are 4", put("labels", query, -100)
  yield "5 labels other than -100; accepted are 4", put("labels", free, 40)
  yield "has a label but is no key", put("tokens", query, 0)
  yield "has a label but is no key", put("tokens", query, lambda t, l: t[3, 1])
  yield "the key's value is", put("labels", query, lambda t, l: l[3, query(t, l)] ^ 1)
  yield "is no pair and no query; accepted is 0", put("tokens", free, 7)

  def asked_twice(t, l):
    at = np.flatnonzero(l[3] != -100)
    t[3, at[1]], l[3, at[1]] = t[3, at[0]], l[3, at[0]]

  def labels_swapped(t, l):
    at = np.flatnonzero(l[3] != -100)
    l[3, at[:2]] = l[3, at[1::-1]]

  def key_as_label(t, l):
    l[l != -100] = t[l != -100]

  def ignored_as_zero(t, l):
    l[l == -100] = 0

  def labels_late(t, l):
    l[:] = np.roll(l, 1, axis=1)

  def pairs_turned(t, l):
    t[:, :8] = t[:, [1, 0, 3, 2, 5, 4, 7, 6]]

  def all_alike(t, l):
    t[:], l[:] = t[0], l[0]

  def one_repeats(t, l):
    t[7], l[7] = t[5], l[5]

  def keys_sorted(t, l):
    order = np.argsort(t[:, :8:2], axis=1)
    keys, values = t[:, :8:2].copy(), t[:, 1:8:2].copy()
    t[:, :8:2] = np.take_along_axis(keys, order, 1)
    t[:, 1:8:2] = np.take_along_axis(values, order, 1)

  def slots_sorted(t, l):
    for row, label in zip(t, l):
      at = np.flatnonzero(label != -100)
      row[at], label[at] = row[:8:2], row[1:8:2]

  def low_values(t, l):  # half of the values, none of the upper ones
    t[:, 1:8:2] = 32 + np.argsort(np.argsort(t[:, 1:8:2], axis=1), axis=1)
    for row, label in zip(t, l):
      value = dict(zip(row[:8:2], row[1:8:2]))
      label[label != -100] = [value[k] for k in row[label != -100]]

  yield "is not asked for; accepted is once", asked_twice
  yield "the key's value is", labels_swapped
  yield "the key's value is", key_as_label
  yield "at 0; accepted is -100 before 8", ignored_as_zero
  yield "the second token of a slot", labels_late
  yield "example 0: key 0 is", pairs_turned
  yield "199 of 200 examples repeat", all_alike
  yield "1 of 200 examples repeat", one_repeats
  yield "the first keys of all examples lie -", keys_sorted
  yield "slots of all examples lie -", slots_sorted
  yield "the values of all examples lie -", low_values


@pytest.mark.parametrize("number", range(27))
def test_each_kind_of_broken_example_is_refused_with_its_reason(number):
  kinds = list(broken())
  assert len(kinds) == 27
  words, breaks = kinds[number]
  # Of a larger vocabulary where chance must not repeat an example.
  knobs = {"vocab_size": V if "repeat" not in words else 1024}
  tokens, labels = ours(**knobs)
  mqar_check.check(tokens, labels, pairs=K, **knobs)
  breaks(tokens, labels)
  with pytest.raises(UserError) as e:
    mqar_check.check(tokens, labels, pairs=K, **knobs)
  assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
  "made, promised, words",
  [
    ({"power": 1.0}, {}, "the slots of all examples lie +"),
    ({}, {"power": 1.0}, "the slots of all examples lie -"),
    ({"noise": True}, {}, "is no pair and no query"),
    ({}, {"noise": True}, "the noise of all examples lie -"),
    ({}, {"pairs": 5}, "example 0"),
    ({}, {"pairs": 11}, "seq_len=40 is too short"),
    ({}, {"blanks": 2}, "example 0"),
    ({}, {"blanks": 1}, "leaves an odd 39 tokens"),
    ({}, {"vocab_size": 62}, "accepted are 0 .. 61"),
    ({"blanks": 4}, {}, "example 0: key 0 is 0"),
  ],
)
def test_another_protocol_than_the_promised_one_is_refused(made, promised, words):
  tokens, labels = ours(**made)
  with pytest.raises(UserError) as e:
    mqar_check.check(tokens, labels, **{"vocab_size": V, "pairs": K} | promised)
  assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda t, l: (t.astype(np.float32), l), "tokens are float32 [200, 40]; accepted are integers"),
    (lambda t, l: (t, l[0]), "labels are int32 [40]; accepted are integers [examples, T]"),
    (lambda t, l: (t, l[:, :-1]), "labels [200, 39]; accepted is one shape"),
    (lambda t, l: (t[:0], l[:0]), "accepted is one shape of at least one example"),
  ],
)
def test_arrays_of_another_form_are_refused(change, words):
  with pytest.raises(UserError) as e:
    mqar_check.check(*change(*ours()), vocab_size=V, pairs=K)
  assert words in str(e.value)

"""The op's benchmark for hardware: a run on a CPU, and that a wrong result gets no time."""

import json

import pytest

from benchmarks import op, op_rivals


def _tiny(monkeypatch):
  shape = dict(B=1, T=20, H=2, D=8, V=8, M=8, C=4, dtype="float32", curvature=0.0)
  monkeypatch.setitem(op.SHAPES, "small", [shape])
  return shape


def test_a_small_run_writes_both_files(tmp_path, capsys, monkeypatch):
  shape = _tiny(monkeypatch)
  results = tmp_path / "op.jsonl"
  op.main(["", "--shapes=small", "--rounds=1", f"--results={results}"])
  (line,) = [json.loads(line) for line in results.read_text().splitlines()]
  assert line["op"] == "trellis, xla" and {k: line[k] for k in shape} == shape
  assert line["forward_seconds"] > 0 and line["both_seconds"] > 0
  assert line["both_roofline"] > 0 and line["gradients_distance"] < 1e-4
  text = capsys.readouterr().out
  assert results.with_suffix(".md").read_text() in text and "no rivals" in text


def test_a_wrong_result_gets_no_time(tmp_path, monkeypatch):
  _tiny(monkeypatch)
  results = tmp_path / "op.jsonl"
  right = op.trellis

  def wrong(*x, implementation, **kw):
    o, state = right(*x, implementation=implementation, **kw)
    return o * (1.1 if implementation == "xla" else 1.0), state

  monkeypatch.setattr(op, "trellis", wrong)
  with pytest.raises(
    SystemExit, match=r"xla: outputs are .* away .* of reference .* no time is given"
  ):
    op.main(["", "--shapes=small", "--rounds=1", f"--results={results}"])
  assert not results.exists()


def test_the_work_grows_with_the_tokens_and_the_backward_is_more():
  one, two = (op.work(dict(op.SHAPES["full"][0], T=t)) for t in (1024, 2048))
  assert two[0] == tuple(2 * x for x in one[0])
  assert one[1][0] > 2 * one[0][0] and one[1][1] == 3 * one[0][1]


@pytest.mark.parametrize("limit, words", [(60, "failed: KeyError"), (0.01, "no time after 0.01 s")])
def test_a_rival_that_fails_or_takes_too_long_is_a_sentence(limit, words):
  shape = dict(B=1, T=20, H=2, D=8, V=8, M=8, dtype="bfloat16")
  times, note = op_rivals.times("none", shape, 1, limit)
  assert times is None and note.startswith("none at B 1, T 20") and words in note

"""The benchmark of mixers: its crossover, and a run small enough for a test."""

import json

from benchmarks import mixers


def test_the_crossover_is_where_a_mixer_stays_faster():
  attention = {512: 1.0, 1024: 3.0, 2048: 9.0}
  assert mixers.crossover({512: 2.0, 1024: 3.5, 2048: 8.0}, attention) == 2048
  assert mixers.crossover({512: 0.5, 1024: 4.0, 2048: 8.0}, attention) == 2048
  assert mixers.crossover({512: 0.5, 1024: 1.0, 2048: 8.0}, attention) == 512
  assert mixers.crossover({512: 0.5, 1024: 1.0, 2048: 9.5}, attention) is None


def test_a_small_run_writes_both_files(tmp_path, capsys):
  results = tmp_path / "mixers.jsonl"
  flags = ["--mixers=trellis", "--length=32", "--lengths=16,32", "--loop=4", "--rounds=1"]
  mixers.main(["", *flags, f"--results={results}"])
  lines = [json.loads(line) for line in results.read_text().splitlines()]
  assert [line["mixer"] for line in lines] == ["attention", "trellis"]
  for line in lines:
    assert line["forward_tokens_per_second"] > 0 and set(line["seconds_by_length"]) == {"16", "32"}
  text = capsys.readouterr().out
  assert results.with_suffix(".md").read_text() in text
  assert text.startswith("    python -m benchmarks.mixers --mixers=trellis") and "| trellis" in text

"""Recall through the training path: the linear reading learns it on every seed.

    python -m pytest -m slow tests/test_recall.py

Each seed is this command, about five minutes on one core:

    python -m experiments.main --config=experiments/configs/mqar.py:linear --config.seed=0
"""

import pathlib

import jax
import pytest

from experiments import config, main, metrics

jax.config.update("jax_numpy_rank_promotion", "raise")

CONFIG = pathlib.Path(config.DEFAULT).with_name("mqar.py")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_linear_reading_recalls_within_2000_steps(seed, tmp_path):
  argv = ["main", f"--config={CONFIG}:linear", f"--config.seed={seed}"]
  cfg = config.parse(argv)
  assert (cfg.steps, cfg.seq_len, cfg.data.mqar.vocab_size) == (2000, 64, 64)
  assert (cfg.data.mqar.pairs, cfg.data.mqar.blanks) == (6, 20)
  assert main.main([*argv, f"--config.workdir={tmp_path / 'run'}"]) == 0
  last = metrics.read(tmp_path / "run" / metrics.JSONL)[-1]
  assert last["step"] == 2000
  assert last["eval/accuracy"] >= 0.97

"""The command line and the config: every mistake is one sentence and exit code 2."""

import os
import pathlib
import subprocess
import sys

import jax
import ml_collections
import pytest

from experiments import config, main
from experiments.configs import default
from experiments.errors import UserError

jax.config.update("jax_numpy_rank_promotion", "raise")


def test_fields_are_set_by_their_dotted_names():
  argv = [
    "main",
    f"--config={config.DEFAULT}",
    "--config.optim.peak_lr=1e-2",
    "--config.steps",
    "7",
  ]
  cfg = config.parse([*argv, "--noconfig.log.tensorboard", "--config.workdir=a=b"])
  assert (cfg.optim.peak_lr, cfg.steps, cfg.log.tensorboard) == (1e-2, 7, False)
  assert cfg.workdir == "a=b"
  assert cfg.seq_len == default.get_config().seq_len


def test_the_default_config_needs_no_flag_and_is_accepted():
  cfg = config.parse(["main"])
  assert cfg.to_dict() == default.get_config().to_dict()
  config.check(cfg)


def test_help_shows_every_section(capsys):
  assert main.main(["main", "--help"]) == 0
  shown = capsys.readouterr().out
  assert all(f"{section}:" in shown for section in ("optim", "mesh", "data", "model"))


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--config.optim.peek_lr=1"], "config.optim.peek_lr is no field of the config; did you mean"),
    (["--config.nothing=1"], "config.nothing is no field of the config; config has batch_size"),
    (
      ["--config.steps.x=1"],
      "config.steps.x is no field of the config; config.steps has no fields",
    ),
    (["--config.optim=3"], "config.optim is a section; its fields are b1, b2"),
    (["--config.steps=many"], "config.steps = many is given, but the field takes an integer"),
    (["--config.steps=1.5"], "config.steps = 1.5 is given, but the field takes an integer"),
    (
      ["--config.optim.clip=x: y"],
      "config.optim.clip = x: y is given, but the field takes a number",
    ),
    (["--config.log.tensorboard=maybe"], "= maybe is given, but the field takes true or false"),
    (["--config.steps"], "Missing value for flag --config.steps"),
    (["--config=nowhere.py"], "config file 'nowhere.py' does not exist"),
    (["--confg.steps=1"], "Unknown command line flag 'confg.steps'"),
    (["train"], "argument 'train' is no flag"),
    (
      ["--config.steps=1", f"--config={config.DEFAULT}"],
      "before a value for --config was specified",
    ),
  ],
)
def test_a_wrong_command_line_is_one_sentence(flags, words):
  with pytest.raises(UserError) as e:
    config.parse(["main", *flags])
  assert words in str(e.value)


@pytest.mark.parametrize(
  "text, words",
  [
    ("get_config = lambda: 1 / 0", "fails with ZeroDivisionError"),
    ("def get_config(:", "fails with SyntaxError"),
    ("get_config = lambda: [1]", "has no get_config() that returns a ConfigDict"),
    ("x = 1", "fails with AttributeError"),
    ("def get_config(): raise ValueError('no such reading')", "ValueError: no such reading"),
    ("def get_config(): raise TypeError('a knob')", "fails with TypeError: a knob"),
  ],
)
def test_a_broken_config_file_is_one_sentence(tmp_path, monkeypatch, text, words):
  # ml_collections loads every config file into one module, where an earlier get_config stays.
  monkeypatch.delitem(sys.modules, "config_config", raising=False)
  path = tmp_path / "broken.py"
  path.write_text(text)
  with pytest.raises(UserError) as e:
    config.parse(["main", f"--config={path}"])
  assert words in str(e.value)


@pytest.mark.parametrize(
  "field, value, words",
  [
    ("steps", 0, "config.steps = 0 is given, but it must be at least 1"),
    ("batch_size", -8, "at least 1"),
    ("seq_len", 0, "at least 1"),
    ("grad_accum", 0, "at least 1"),
    ("seed", -1, "from 0 to 2**32 - 1"),
    ("seed", 2**32, "from 0 to 2**32 - 1"),
    ("workdir", "", "config.workdir is empty"),
    ("model.num_heads", 0, "at least 1"),
    ("model.dtype", "float16", "accepted are float32, bfloat16"),
    ("data.packing", "none", "accepted are documents, concat"),
    ("optim.schedule", "step", "accepted are cosine, linear, wsd"),
    ("optim.peak_lr", 0.0, "above 0"),
    ("optim.peak_lr", float("nan"), "above 0"),
    ("optim.peak_lr", float("inf"), "above 0"),
    ("optim.b2", 1.0, "at least 0 and below 1"),
    ("optim.clip", -1.0, "at least 0"),
    ("optim.end_lr_ratio", 2.0, "from 0 to 1"),
    (
      "optim.warmup_steps",
      10**6,
      "config.optim.warmup_steps = 1000000 is given, but it must be at most",
    ),
    ("checkpoint.every", 0, "at least 1"),
    ("checkpoint.keep", 0, "at least 1"),
    ("eval.every", -1, "at least 0"),
    ("eval.batches", 0, "at least 1"),
    ("log.every", 0, "at least 1"),
    ("profile.start", 0, "a step, or -1"),
    ("profile.steps", 0, "at least 1"),
  ],
)
def test_a_wrong_value_is_one_sentence(field, value, words):
  cfg = default.get_config()
  cfg.update_from_flattened_dict({field: value})
  with pytest.raises(UserError) as e:
    config.check(cfg)
  assert f"config.{field}" in str(e.value)
  assert words in str(e.value)


def test_decay_steps_bind_wsd_alone():
  cfg = default.get_config()
  cfg.optim.decay_steps = cfg.steps + 1
  config.check(cfg)
  cfg.optim.schedule = "wsd"
  with pytest.raises(UserError, match="decay_steps"):
    config.check(cfg)


def test_the_models_config_has_the_knobs_of_its_mixers_alone():
  cfg = default.get_config()
  cfg.model.trellis.chunk_size = 4
  lm_config = config.lm_config(cfg.model, vocab_size=11)
  assert (lm_config.vocab_size, lm_config.width) == (11, cfg.model.width)
  assert lm_config.mixers["trellis"]["chunk_size"] == 4
  assert set(lm_config.mixers) == {"trellis"}


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--config.model.mixer=lstm"], "lstm"),
    (["--config.model.num_heads=7"], "7"),
    (["--config.model.remat=some"], "some"),
    (
      ["--config.batch_size=3", "--config.grad_accum=2"],
      "config.batch_size = 3 must be a multiple",
    ),
    (["--config.mesh.fsdp=3"], "whose product must be"),
    (["--config.mesh.fsdp=-1"], "only one axis may be -1"),
    (["--config.mesh.model=0"], "an axis is at least 1 device"),
    (["--config.data.path=nowhere"], "nowhere"),
    (["--config.data.tokenizer=words"], "words"),
    (["--config.data.align=7"], "7"),
    (["--config.distributed.enabled"], "config.distributed"),
    (["--config.workdir=text/0.txt"], "config.workdir = text/0.txt cannot be made"),
  ],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_written(
  flags, words, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  for i in range(12):
    (tmp_path / "text").mkdir(exist_ok=True)
    (tmp_path / "text" / f"{i}.txt").write_text(f"document {i} " * 40)
  small = ["--config.data.path=text", "--config.data.tokenizer=byte", "--config.seq_len=16"]
  small += ["--config.steps=1", "--config.optim.warmup_steps=0", "--config.workdir=run"]
  assert main.main(["main", *small, *flags]) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and err.count("\n") == 1
  assert words in err
  assert not (tmp_path / "run").exists()


def test_the_command_exits_with_2_and_without_a_traceback(tmp_path):
  command = [sys.executable, "-m", "experiments.main", "--config.optim.peek_lr=1"]
  env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr.startswith("error: config.optim.peek_lr is no field")
  assert "Traceback" not in done.stderr
  assert not any(tmp_path.iterdir())


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert isinstance(config.parse(["main"]), ml_collections.ConfigDict)
  assert pathlib.Path(config.DEFAULT).is_absolute()

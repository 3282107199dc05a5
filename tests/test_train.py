"""Whole runs of the real command on a tiny model: kills, resumption, meshes, stops, refusals.

What must be bit-equal runs in processes of its own, as a user's run does.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import checkpoint, config, hooks, main, metrics, step, train
from experiments import mesh as mesh_lib
from experiments.errors import UserError

jax.config.update("jax_numpy_rank_promotion", "raise")

STEPS = 6
# With seed 0 a read nearly cancels, whose gradient shows the order of sums in fp32 at 3e-4.
FLAGS = f"""
  steps={STEPS} batch_size=4 seq_len=32 data.tokenizer=byte optim.warmup_steps=2
  model.width=16 model.num_layers=2 model.num_heads=2 model.mlp_width=32 model.trellis.num_slots=8
  model.trellis.chunk_size=8 checkpoint.every=2 eval.every=3 eval.batches=2 log.every=1
  log.tensorboard=False seed=1
""".split()

# Runs the command with a trap: what is done, and where.
TRAP = """
import os, signal, sys
from experiments import metrics
from experiments.main import main

trap, argv = sys.argv[1], ["main", *sys.argv[2:]]
kill = lambda number=signal.SIGKILL: os.kill(os.getpid(), number)
write = metrics.JsonlWriter.write
removing = []

def cut(writer, record):  # the line of step 5 is half on disk
  if record["step"] == 5:
    writer.file.write('{"step": 5, "train/lo')
    writer.file.flush()
    kill()
  write(writer, record)

def stop(writer, record):  # somebody asks to stop while step 3 is the last one logged
  write(writer, record)
  if record["step"] == 3:
    kill(signal.SIGTERM)

def audit(event, args):  # at these points the checkpoint of step 4 is being written, or 2 deleted
  path = str(args[0]) if args else ""
  if trap == "first write" and event == "open" and "checkpoints/4." in path and "/params" in path:
    kill()
  if trap == "commit" and event == "os.rename" and str(args[1]).endswith("checkpoints/4"):
    kill()
  if trap == "deletion" and event == "shutil.rmtree" and path.endswith("checkpoints/2"):
    removing.append(path)
  if removing and event == "os.remove":
    removing.append(path)
    if len(removing) == 4:
      kill()

metrics.JsonlWriter.write = {"half a line": cut, "sigterm": stop}.get(trap, write)
sys.addaudithook(audit)
sys.exit(main(argv))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with two corpora of 30 documents."""
  home = tmp_path_factory.mktemp("home")
  words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "ran", "away", "from", "home"]
  for seed, folder in enumerate((home / "text", home / "other")):
    folder.mkdir()
    for i in range(30):
      text = " ".join(np.random.default_rng([seed, i]).choice(words, 60))
      (folder / f"{i}.txt").write_text(text)
  return home


def _argv(home, workdir, *flags):
  flags = [
    *FLAGS,
    f"data.path={home}/text",
    f"data.cache={home}/cache",
    f"workdir={workdir}",
    *flags,
  ]
  return [f"--config.{flag}" for flag in flags]


def _start(home, workdir, *flags, trap=None, script=None, devices=1):
  """Starts the command, the trap around it or a script with its flags, in its own process."""
  devices = f" --xla_force_host_platform_device_count={devices}"
  env = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + devices,
  }
  command = ["-c", script] if script else ["-m", "experiments.main"]
  command = ["-c", TRAP, trap] if trap else command
  argv = [sys.executable, *command, *_argv(home, workdir, *flags)]
  pipe = subprocess.PIPE
  return subprocess.Popen(argv, env=env, stdout=pipe, stderr=pipe, text=True)


def _process(*args, **kwargs):
  """Runs what `_start` starts to its end."""
  with _start(*args, **kwargs) as process:
    out, err = process.communicate(timeout=300)
  return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _records(workdir):
  """The records of a run without what its clock says."""
  timeless = lambda r: {k: v for k, v in r.items() if not k.startswith("time/")}
  return [timeless(record) for record in metrics.read(workdir / metrics.JSONL)]


def _assert_close(workdir, whole):
  """The same records up to the order of the devices' sums, fp32."""
  got, want = _records(workdir), _records(whole)
  assert [r.keys() for r in got] == [r.keys() for r in want]
  for a, b in zip(got, want):
    np.testing.assert_allclose(list(a.values()), [b[k] for k in a], rtol=2e-4)


def _kept(workdir):
  return sorted(int(p.name) for p in (workdir / checkpoint.FOLDER).iterdir())


@pytest.fixture(scope="module")
def whole(home):
  """The workdir of a run that nothing has disturbed."""
  done = _process(home, home / "whole")
  assert done.returncode == 0, done.stderr
  assert f"step {STEPS} is saved in {home}/whole" in done.stdout
  return home / "whole"


def test_a_run_logs_every_step_evaluates_and_keeps_the_newest_checkpoints(whole):
  records = _records(whole)
  assert [r["step"] for r in records] == list(range(1, STEPS + 1))
  assert [r["step"] for r in records if "eval/bits_per_byte" in r] == [3, 6]
  assert records[-1]["train/loss"] < records[0]["train/loss"]
  assert _kept(whole) == [4, 6]
  about = checkpoint.read_about(whole, 6)
  assert about["data"] == {"next_index": 6}
  assert about["config"]["model"]["width"] == 16


@pytest.mark.parametrize(
  "trap, keep, latest",
  [
    ("half a line", 2, (2, 4)),  # 4 is written in the background
    ("first write", 2, (2,)),
    ("commit", 2, (2,)),
    ("deletion", 1, (4,)),
  ],
)
def test_a_run_killed_at_any_time_goes_on_as_if_it_had_not_been(
  trap, keep, latest, home, whole, tmp_path
):
  keep = f"checkpoint.keep={keep}"
  killed = _process(home, tmp_path, keep, trap=trap)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  step = checkpoint.latest_step(tmp_path)
  assert step in latest
  again = _process(home, tmp_path, keep)
  assert again.returncode == 0, again.stderr
  assert f"going on from step {step}" in again.stdout
  assert _records(tmp_path) == _records(whole)
  assert _kept(tmp_path) == [4, 6][2 - int(keep[-1]) :]


def test_a_run_stopped_on_four_devices_goes_on_on_one(home, whole, tmp_path):
  mesh = ["mesh.fsdp=2", "mesh.model=2", "profile.start=2", "profile.steps=1"]
  stopped = _process(home, tmp_path, *mesh, trap="sigterm", devices=4)
  assert stopped.returncode == 0, stopped.stderr
  assert "4 x cpu (data=1 fsdp=2 model=2)" in stopped.stdout
  (step,) = re.findall(r"SIGTERM: stopped and saved after step (\d)", stopped.stdout)
  assert 3 <= int(step) < STEPS
  assert checkpoint.latest_step(tmp_path) == int(step)
  assert any((tmp_path / "profile").rglob("*.xplane.pb"))
  again = _process(home, tmp_path)
  assert f"going on from step {step}" in again.stdout
  _assert_close(tmp_path, whole)


@pytest.mark.slow
def test_two_processes_train_as_one(home, whole, tmp_path):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  flags = ["distributed.enabled=True", f"distributed.coordinator={address}"]
  flags += ["distributed.num_processes=2", "distributed.process_id={}"]
  run = lambda i: _process(home, tmp_path, *[flag.format(i) for flag in flags])
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first, second = pool.map(run, range(2))
  assert first.returncode == second.returncode == 0, first.stderr + second.stderr
  assert "2 x cpu (data=2 fsdp=1 model=1)" in first.stdout
  assert "step" not in second.stdout
  _assert_close(tmp_path, whole)
  assert _kept(tmp_path) == [4, 6]


SHARDED = """
import json, sys
import jax
from experiments import config, train

job = train.prepare(config.parse(["main", *sys.argv[1:]]))
with jax.set_mesh(job.mesh):
  program = train.build(job)
  memory = program.init.lower().compile().memory_analysis()
  state = program.init()
here = lambda x: x.addressable_shards[0].data.nbytes
print(json.dumps({
  "whole": sum(x.nbytes for x in jax.tree.leaves(state)),
  "one device": sum(here(x) for x in jax.tree.leaves(state)),
  "peak": memory.output_size_in_bytes + memory.temp_size_in_bytes,
  "largest": max((x.nbytes, here(x)) for x in jax.tree.leaves(state.params)),
  "as restored": jax.tree.all(
    jax.tree.map(lambda x, a: x.sharding == a.sharding, state, program.abstract)
  ),
}))
"""


def test_text_that_is_one_document_needs_no_segment_ids(home, tmp_path):
  job = train.prepare(config.parse(["main", *_argv(home, tmp_path / "run", "data.packing=concat")]))
  program = train.build(job)
  params = program.init().params
  *_, last = job.batches("train", shuffle=False, repeat=False)
  assert not last["weights"].all()  # its last row is padded
  with jax.set_mesh(job.mesh):
    without, whole = job.put(last), mesh_lib.put_batch(last, job.mesh)
    assert "segment_ids" not in without and "segment_ids" in whole
    got, want = (program.evaluate(params, x, program.token_bytes) for x in (without, whole))
  assert got.keys() == want.keys() and float(got["count"]) == last["weights"].sum()
  for key in want:
    np.testing.assert_allclose(got[key], want[key], rtol=1e-6)


def test_parameters_and_moments_are_born_sharded(home, tmp_path):
  sizes = ["mesh.fsdp=4", "model.width=64", "model.mlp_width=128"]
  done = _process(home, tmp_path / "run", *sizes, script=SHARDED, devices=4)
  got = json.loads(done.stdout)
  assert got["largest"][1] == got["largest"][0] // 4
  assert got["one device"] < 0.3 * got["whole"]
  # No device holds a whole copy at any time, not even while the initial values are drawn.
  assert got["peak"] < 0.6 * got["whole"]
  assert got["as restored"]
  assert not (tmp_path / "run").exists()


class Bigram(nnx.Module):
  """The smallest module with what the trainer asks of a language model: it compiles in no time."""

  def __init__(self, cfg, *, rngs):
    self.embedding = nnx.Param(rngs.params.normal((cfg.vocab_size, cfg.width)))

  def hidden(self, tokens, *, segment_ids):
    return self.embedding[...][tokens], None

  def head_kernel(self):
    return self.embedding[...].T

  def flops(self, num_tokens):
    return num_tokens


@pytest.fixture(scope="module")
def poisoned(home, tmp_path_factory):
  """A run in this process whose loss is NaN at step 4, and what it did in what order."""
  workdir, events = tmp_path_factory.mktemp("poisoned"), []
  train_step, build, read = step.train_step, train.build, metrics.Log.read

  def poison(state, batch, **kwargs):
    new, values = train_step(state, batch, **kwargs)
    return new, values | {"loss": jnp.where(state.step == 3, jnp.nan, values["loss"])}

  def watched_build(job):
    program = build(job)

    def dispatch(state, batch):
      events.append(f"dispatch {len([e for e in events if 'dispatch' in e]) + 1}")
      return program.train(state, batch)

    return dataclasses.replace(program, train=dispatch)

  def watched_read(log, n, values):
    events.append(f"read {n}")
    return read(log, n, values)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "LM", Bigram)
    patch.setattr(step, "train_step", poison)
    patch.setattr(train, "build", watched_build)
    patch.setattr(metrics.Log, "read", watched_read)
    with contextlib.redirect_stderr(io.StringIO()) as err:
      code = main.main(["main", *_argv(home, workdir, "eval.every=0")])
  return workdir, events, code, err.getvalue()


def test_a_nan_stops_the_run_names_its_step_and_keeps_the_last_good_checkpoint(poisoned):
  workdir, _, code, err = poisoned
  assert code == 1
  assert err.startswith("error: loss is nan at step 4") and err.count("\n") == 1
  assert "the checkpoint of step 2 is kept" in err
  assert _kept(workdir) == [2]  # step 4 was due to be saved
  assert [r["step"] for r in metrics.read(workdir / metrics.JSONL)] == [1, 2, 3]


def test_metrics_are_read_one_step_late_but_before_a_checkpoint(poisoned):
  assert poisoned[1] == [
    "dispatch 1", "dispatch 2", "read 1", "read 2", "dispatch 3", "dispatch 4", "read 3", "read 4"
  ]  # fmt: skip


def test_a_finished_run_says_so_and_changes_nothing(home, whole, capsys):
  before = (whole / metrics.JSONL).read_bytes()
  assert main.main(["main", *_argv(home, whole)]) == 0
  assert f"is at step {STEPS}; a larger config.steps goes on" in capsys.readouterr().out
  assert (whole / metrics.JSONL).read_bytes() == before


@pytest.mark.parametrize(
  "flag, words",
  [
    ("model.width=32", "model.width = 16 (here 32)"),
    ("model.trellis.num_slots=4", "model.trellis.num_slots = 8 (here 4)"),
    ("seed=2", "seed = 1 (here 2)"),
    ("data.path={home}/other", "corpus = "),
  ],
)
def test_another_run_in_the_same_workdir_is_refused(flag, words, home, whole, capsys):
  before = sorted(whole.rglob("*"))
  argv = _argv(home, whole, f"steps={2 * STEPS}", flag.format(home=home))
  assert main.main(["main", *argv]) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and err.count("\n") == 1
  assert words in err
  assert sorted(whole.rglob("*")) == before


def test_two_runs_in_one_workdir_are_refused(tmp_path):
  with hooks.sole_use(tmp_path), pytest.raises(UserError, match="in use"), hooks.sole_use(tmp_path):
    pass
  with hooks.sole_use(tmp_path):
    pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_remembered_once_and_then_signals_act_as_ever(number):
  before = signal.getsignal(number)
  with hooks.StopRequest() as stop:
    assert not stop.requested(1)
    os.kill(os.getpid(), number)
    assert stop.requested(2)
    assert stop.name == signal.Signals(number).name
    assert signal.getsignal(number) is before
  assert signal.getsignal(number) is before

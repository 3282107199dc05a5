"""The trainer: sets a run up, and runs it from where its last checkpoint stands.

What a step computes depends on the state and on the step's batch, and the batch on the config's
seed and the step's number: a run that was killed and started again makes the same numbers as one
that was not.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import checkpoint, config, data, hooks, metrics, optim, tasks, writers
from experiments import mesh as mesh_lib
from experiments import step as step_lib
from experiments.console import Console, si
from experiments.errors import UserError
from trellis_jax import LM, sharding


@dataclasses.dataclass(frozen=True)
class Job:
  """A checked run, before anything is computed or written."""

  cfg: ml_collections.ConfigDict
  dataset: data.Dataset | tasks.TaskDataset
  mesh: Mesh
  make_lm: Callable[[], LM]
  lm: LM  # abstract: shapes without arrays
  about: dict[str, Any]  # what its checkpoints belong to
  start: int  # step of the checkpoint to go on from, 0 = none

  @property
  def workdir(self) -> pathlib.Path:
    return pathlib.Path(self.cfg.workdir).expanduser()

  def batches(self, split: str, **kwargs):
    """This process's batches of a split; see data.loader."""
    cfg, processes = self.cfg, jax.process_count()
    return data.loader(
      getattr(self.dataset, split),
      seq_len=cfg.seq_len,
      batch_size=cfg.batch_size // processes,
      seed=cfg.seed,
      packing=cfg.data.packing,
      align=cfg.data.align,
      process_index=jax.process_index(),
      process_count=processes,
      **kwargs,
    )

  def put(self, batch: dict[str, np.ndarray]) -> step_lib.Batch:
    """What the model is given of this process's rows, on the mesh."""
    batch = data.model_inputs(self.dataset, self.cfg.data.packing, batch)
    return mesh_lib.put_batch(batch, self.mesh)

  def eval_batches(self):
    """The batches of an evaluation, the same ones each time."""
    return itertools.islice(
      self.batches("validation", shuffle=False, repeat=False), self.cfg.eval.batches
    )


def prepare(cfg: ml_collections.ConfigDict) -> Job:
  """Checks everything about a run that can be checked before it computes or writes.

  The corpus's token files are the exception: they are made here when absent.

  Raises:
    ValueError: a field, the data, or a checkpoint in the workdir does not fit, in one sentence.
  """
  config.check(cfg)
  writers.check(cfg.log)
  mesh_lib.start_distributed(cfg.distributed)
  mesh = mesh_lib.make(cfg.mesh)
  mesh_lib.check_batch(cfg.batch_size, cfg.grad_accum, mesh)
  # A model of any vocabulary first: preparing a corpus takes longer than finding a wrong field.
  nnx.eval_shape(lambda: LM(config.lm_config(cfg.model, 1), rngs=nnx.Rngs(0)))
  dataset = data.load(cfg.data)
  lm_config = config.lm_config(cfg.model, dataset.vocab_size)
  make_lm = lambda: LM(lm_config, rngs=nnx.Rngs(cfg.seed))
  lm = nnx.eval_shape(make_lm)
  params = nnx.to_pure_dict(nnx.split(lm, nnx.Param)[1])
  about = checkpoint.about(cfg, params, dataset.identity)
  job = Job(cfg, dataset, mesh, make_lm, lm, about, start=0)
  job.batches("train")
  job.eval_batches()
  start = checkpoint.latest_step(job.workdir)
  if start is None:
    return job
  checkpoint.check_continues(checkpoint.read_about(job.workdir, start), about, job.workdir)
  return dataclasses.replace(job, start=start)


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled functions of a run, and where their arrays live."""

  init: Callable[[], step_lib.State]
  train: Callable[..., tuple[step_lib.State, dict[str, jax.Array]]]
  evaluate: Callable[..., dict[str, jax.Array]]
  abstract: step_lib.State  # shapes and shardings of the state
  token_bytes: jax.Array  # [vocab]


def build(job: Job) -> Program:
  """Shards the state over the mesh and jits a run's functions with those shardings."""
  cfg, mesh = job.cfg, job.mesh
  place = lambda spec: NamedSharding(mesh, spec)
  everywhere, rows = place(PartitionSpec()), place(sharding.BATCH)
  schedule, optimizer = optim.schedule(cfg.optim, cfg.steps), optim.optimizer(cfg.optim, cfg.steps)
  init = functools.partial(step_lib.init_state, job.make_lm, optimizer)
  shapes = jax.eval_shape(init)
  params = jax.tree.map(place, sharding.param_specs(shapes.params, mesh))
  opt_state = optax.tree_utils.tree_map_params(
    optimizer, lambda _, s: s, shapes.opt_state, params, transform_non_params=lambda _: everywhere
  )
  state = step_lib.State(everywhere, params, opt_state)
  graphdef, _ = nnx.split(job.lm, nnx.Param)
  sums_fn = step_lib.loss_fn(
    graphdef, z_loss=cfg.optim.z_loss, batch_shards=mesh_lib.batch_shards(mesh)
  )
  shared = {"sums_fn": sums_fn, "grad_accum": cfg.grad_accum}
  train = functools.partial(
    step_lib.train_step,
    optimizer=optimizer,
    schedule=schedule,
    constrain=lambda grads: jax.lax.with_sharding_constraint(grads, params),
    **shared,
  )
  evaluate = functools.partial(step_lib.eval_step, **shared)
  return Program(
    init=jax.jit(init, out_shardings=state),
    train=jax.jit(
      train, in_shardings=(state, rows), out_shardings=(state, everywhere), donate_argnums=0
    ),
    evaluate=jax.jit(evaluate, in_shardings=(params, rows, everywhere), out_shardings=everywhere),
    abstract=jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state
    ),
    token_bytes=jax.device_put(job.dataset.token_bytes, everywhere),
  )


def evaluate(job: Job, program: Program, params: step_lib.Params) -> dict[str, float]:
  """The `eval/` fields of a record: held-out loss, perplexity, accuracy, bits per byte."""
  parts = []
  for batch in job.eval_batches():
    parts.append(program.evaluate(params, job.put(batch), program.token_bytes))
    parts[-2:-1] = jax.device_get(parts[-2:-1])  # so that two batches wait in memory at most
  sums = {k: math.fsum(float(part[k]) for part in parts) for k in parts[0]}
  loss = sums["nll"] / sums["count"]
  scores = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
  scores["eval/accuracy"] = sums["correct"] / sums["count"]
  if sums["bytes"]:  # text
    scores["eval/bits_per_byte"] = sums["nll"] / math.log(2) / sums["bytes"]
  return scores


def run(job: Job) -> None:
  """Trains to `cfg.steps`, or until somebody asks to stop; writes into the workdir.

  Raises:
    UserError: the checkpoint to go on from cannot be read, or another process trains here.
    NotFiniteError: a loss or a norm is NaN or infinite; the last good checkpoint is kept.
  """
  if job.start >= job.cfg.steps:
    ended = f"{job.workdir} is at step {job.start}; a larger config.steps goes on from there"
  else:
    program = build(job)
    try:
      job.workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise UserError(f"config.workdir = {job.cfg.workdir} cannot be made: {e}") from e
    with jax.set_mesh(job.mesh), hooks.sole_use(job.workdir):
      try:
        ended = _loop(job, program)
      except metrics.NotFiniteError as e:
        good = checkpoint.latest_step(job.workdir)
        kept = f"the checkpoint of step {good} is kept" if good else "no checkpoint was written yet"
        raise metrics.NotFiniteError(f"{e} and training has stopped; {kept}") from None
  if jax.process_index() == 0:
    print(ended, flush=True)


def _loop(job: Job, program: Program) -> str:
  """Steps, evaluations and checkpoints; returns how it ended."""
  cfg, steps = job.cfg, job.cfg.steps
  state, batches = _first_state(job, program)
  due = lambda n, every: every and (n % every == 0 or n == steps)
  with (
    checkpoint.Checkpoints(job.workdir, cfg.checkpoint.keep) as checkpoints,
    hooks.StopRequest() as stop,
    hooks.Profiler(job.workdir, cfg.profile) as profiler,
  ):
    pending = None
    with _open_log(job, program) as log:
      for n in range(job.start + 1, steps + 1):
        profiler.before(n, state.step)
        state, values = program.train(state, job.put(next(batches)))
        if pending:  # read while this step runs, so that the device never waits for the host
          log.write(log.read(*pending))
        pending = n, values
        stopping = stop.requested(n)
        evaluates, saves = due(n, cfg.eval.every), stopping or due(n, cfg.checkpoint.every)
        if evaluates or saves:
          record = log.read(*pending)  # raises before a state that is not finite can be saved
          log.write(record | (evaluate(job, program, state.params) if evaluates else {}))
          pending = None
          if saves:
            position = {"data": batches.get_state()}
            checkpoints.save(n, state.params, state.opt_state, job.about | position)
          log.throughput.skip()
        if stopping and n < steps:
          return (
            f"{stop.name}: stopped and saved after step {n}; the same command goes on from there"
          )
  return f"step {steps} is saved in {job.workdir}"


def _first_state(job: Job, program: Program):
  """The state after step `job.start`, and the iterator of the batches that follow it."""
  batches = job.batches("train")
  if not job.start:
    return program.init(), batches
  abstract = program.abstract
  items = checkpoint.restore(
    job.workdir, job.start, params=abstract.params, opt_state=abstract.opt_state
  )
  batches.set_state(checkpoint.read_about(job.workdir, job.start)["data"])
  step = jax.device_put(np.int32(job.start), abstract.step.sharding)
  return step_lib.State(step, **items), batches


def _open_log(job: Job, program: Program) -> metrics.Log:
  """The log of a run, which writes in process 0 alone."""
  cfg, outputs, on_step = job.cfg, [], lambda record: None
  if jax.process_index() == 0:
    console = Console(job.start, cfg.steps)
    parameters = sum(x.size for x in jax.tree.leaves(program.abstract.params))
    axes = " ".join(f"{axis}={size}" for axis, size in job.mesh.shape.items())
    console.say(
      f"{si(parameters).strip()} parameters, {cfg.batch_size} x {cfg.seq_len} tokens a step, "
      f"{job.mesh.size} x {jax.devices()[0].device_kind} ({axes}), {job.workdir}"
      + (f", going on from step {job.start}" if job.start else "")
    )
    outputs, on_step = [console, *writers.open_all(job.workdir, cfg, job.start)], console.advance
  tokens = cfg.batch_size * cfg.seq_len
  flops = 3 * cfg.batch_size * job.lm.flops(cfg.seq_len)  # backward counts as twice the forward
  throughput = metrics.Throughput(tokens, flops, metrics.peak_flops(jax.devices()))
  return metrics.Log(outputs, throughput, cfg.log.every, cfg.steps, on_step)

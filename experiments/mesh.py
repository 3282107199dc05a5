"""The device mesh of a run: axes (data, fsdp, model), and batches laid over the first two.

The axes are Auto: the compiler moves the activations, and what the program states is where
parameters, optimiser state and batches live (`jax.jit`'s shardings).
"""

import jax
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from experiments.errors import UserError
from trellis_jax import sharding

AXES = (*sharding.ROWS, *sharding.HEADS)


def start_distributed(cfg: ml_collections.ConfigDict) -> None:
  """Joins this process to the others of the run when the config asks for it, else does nothing.

  Called before the first use of a device. Empty or -1 fields are found by JAX where it knows the
  cluster (TPU pods, Slurm, Kubernetes, Open MPI).
  """
  if not cfg.enabled:
    return
  given = lambda n: None if n < 0 else n
  address, count = cfg.coordinator or None, given(cfg.num_processes)
  try:
    jax.distributed.initialize(address, count, given(cfg.process_id))
  except (ValueError, RuntimeError) as e:
    raise UserError(
      f"config.distributed (coordinator={cfg.coordinator!r}, num_processes={cfg.num_processes}, "
      f"process_id={cfg.process_id}) does not start: {e}"
    ) from e


def make(cfg: ml_collections.ConfigDict) -> Mesh:
  """The mesh of `cfg.mesh`; one axis may be -1 and takes the devices that the others leave."""
  sizes = {axis: cfg[axis] for axis in AXES}
  given = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
  devices = jax.device_count()
  if any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f"config.mesh is {given}, but an axis is at least 1 device, or -1 for the rest")
  if list(sizes.values()).count(-1) > 1:
    raise UserError(f"config.mesh is {given}, but only one axis may be -1")
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  sizes = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
  if int(np.prod(list(sizes.values()))) != devices:
    raise UserError(f"config.mesh is {given}, whose product must be the {devices} devices here")
  if jax.local_device_count() % sizes["model"]:
    raise UserError(
      f"config.mesh.model = {sizes['model']} must divide the {jax.local_device_count()} devices of "
      "a process, so that a process has whole rows of the batch"
    )
  return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
  """Devices among which the rows of a batch are divided."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, grad_accum: int, mesh: Mesh) -> None:
  """Raises UserError unless every device gets the same rows of every microbatch."""
  parts = grad_accum * batch_shards(mesh)
  if batch_size % parts or batch_size % jax.process_count():
    raise UserError(
      f"config.batch_size = {batch_size} must be a multiple of {parts} "
      f"(grad_accum {grad_accum} x mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']})"
    )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows `[B / processes, T]` as arrays `[B, T]` over the mesh."""
  rows = NamedSharding(mesh, sharding.BATCH)
  return {k: jax.make_array_from_process_local_data(rows, v) for k, v in batch.items()}

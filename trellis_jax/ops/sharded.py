"""The op under a mesh: batch and heads may be sharded, and no device needs another's.

Neither a custom loop nor a kernel has a sharding rule, so the op maps itself over the mesh with
`jax.shard_map`. On Explicit axes the arrays carry their sharding in their type. On Auto axes the
compiler partitions the plain program; a kernel is mapped over the axes that bear the names of
`trellis_jax.sharding`, rows over `data` and `fsdp`, heads over `model`.
"""

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from trellis_jax.ops.chunked import Inputs
from trellis_jax.ops.state import TrellisState
from trellis_jax.sharding import HEADS, ROWS, explicit


def _auto(mesh) -> dict[str, int]:
  """Returns the sizes of the Auto axes that split anything."""
  axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
  return {name: size for name, size, kind in axes if kind == AxisType.Auto and size > 1}


def unmapped() -> str | None:
  """Returns why no kernel can run under the current mesh, or None."""
  mesh = jax.sharding.get_abstract_mesh()
  other = [name for name in _auto(mesh) if name not in ROWS + HEADS]
  if not other:
    return None
  return (
    f"the mesh has Auto axes named {', '.join(map(str, other))}, but kernels are mapped over "
    f"{', '.join(ROWS + HEADS)} alone; use Explicit axes, or jax.shard_map around the op"
  )


def _dividing(names, sizes: dict[str, int], count: int):
  """Returns the axes, of those there are, that split `count` evenly; None for none."""
  found = ()
  for name in names:
    if name in sizes and count % sizes[name] == 0:
      found, count = (*found, name), count // sizes[name]
  return found or None


def over_mesh(call, kernel: bool, x: Inputs, memory, state, segment_ids):
  """Returns `call(x, memory, state, segment_ids)`, mapped over the mesh axes that shard q.

  kernel: whether the call is one that the compiler cannot partition.
  """
  sharding = explicit(x.q)
  if sharding is not None:
    batch, time, heads, width = (*sharding.spec, *(None,) * (4 - len(sharding.spec)))
    if time is not None or width is not None:
      raise ValueError(
        f"q is sharded as {sharding.spec}; only B and H of [B, T, H, D] may be sharded"
      )
    return _map(call, sharding.mesh, batch, heads, x, memory, state, segment_ids)
  mesh = jax.sharding.get_abstract_mesh()
  sizes = _auto(mesh)
  if not kernel or not sizes:
    return call(x, memory, state, segment_ids)
  batch = _dividing(ROWS, sizes, x.q.shape[0])
  heads = _dividing(HEADS, sizes, x.q.shape[2])
  return _map(call, mesh, batch, heads, x, memory, state, segment_ids)


def _map(call, mesh, batch, heads, x: Inputs, memory, state, segment_ids):
  """The call under shard_map, rows over the axes `batch` and heads over `heads`."""
  tokens, gates = P(batch, None, heads, None), P(batch, None, heads)
  inputs_spec = Inputs(tokens, tokens, tokens, tokens, gates, gates)
  memory_spec = None if memory is None else (P(heads, None, None), P(heads, None, None))
  rows = P(batch, heads, None, None)
  has_anchors = state is not None and state.anchor_k is not None

  def state_spec(anchors):
    return TrellisState(
      memory_k=rows,
      memory_v=rows,
      anchor_k=rows if anchors else None,
      anchor_v=rows if anchors else None,
      offset=P(batch),
      segment=P(batch),
    )

  specs = (
    inputs_spec,
    memory_spec,
    None if state is None else state_spec(has_anchors),
    None if segment_ids is None else P(batch, None),
  )
  args = (x, memory, state, segment_ids)
  if AxisType.Explicit in mesh.axis_types:
    place = lambda a, s: jax.sharding.reshard(a, NamedSharding(mesh, s))
    args = jax.tree.map(place, args, specs)
  out = jax.eval_shape(call, *jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args))
  anchors = out[1].anchor_k is not None
  mapped = jax.shard_map(
    call, mesh=mesh, in_specs=specs, out_specs=(tokens, state_spec(anchors)), check_vma=False
  )
  return mapped(*args)

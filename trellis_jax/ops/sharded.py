"""The op under a mesh: batch and heads may be sharded, and no device needs another's.

On Explicit axes the arrays carry their sharding in their type; the op maps itself over those axes
with `jax.shard_map`, because neither a custom loop nor a kernel has a sharding rule. On Auto axes
the compiler partitions the plain program.
"""

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from trellis_jax.ops.chunked import Inputs
from trellis_jax.ops.state import TrellisState


def over_mesh(call, x: Inputs, memory, state, segment_ids):
  """Returns `call(x, memory, state, segment_ids)`, mapped over the mesh axes that shard q."""
  sharding = jax.typeof(x.q).sharding
  mesh = sharding.mesh
  if mesh.empty or AxisType.Explicit not in mesh.axis_types:
    return call(x, memory, state, segment_ids)
  batch, time, heads, width = (*sharding.spec, *(None,) * (4 - len(sharding.spec)))
  if time is not None or width is not None:
    raise ValueError(
      f"q is sharded as {sharding.spec}; only B and H of [B, T, H, D] may be sharded"
    )
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
  place = lambda a, s: jax.sharding.reshard(a, NamedSharding(mesh, s))
  args = jax.tree.map(place, args, specs)
  out = jax.eval_shape(call, *jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args))
  anchors = out[1].anchor_k is not None
  mapped = jax.shard_map(
    call, mesh=mesh, in_specs=specs, out_specs=(tokens, state_spec(anchors)), check_vma=False
  )
  return mapped(*args)

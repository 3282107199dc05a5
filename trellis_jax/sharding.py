"""Where parameters and states live on a mesh with the axes data, fsdp and model.

Matrices are split twice: the side that multiplies heads, slots, hidden units or vocabulary over
`model`, the residual stream's side over `fsdp`. Vectors are whole on every device.
"""

import re
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from trellis_jax.typing import Array

# The last part of a parameter's path -> axes of its last dimensions.
_RULES = (
  (r"embedding$", ("model", "fsdp")),
  (r"(^|/)head$", ("fsdp", "model")),
  (r"(gates|low)/kernel$", ("fsdp", None)),
  (r"high/kernel$", (None, "model")),
  (r"conv_bc/kernel$", (None, None)),
  (r"bc/kernel$", ("fsdp", None)),
  (r"conv_\w+/kernel$", (None, "model")),
  (r"(out|down)/kernel$", ("model", "fsdp")),
  (r"kernel$", ("fsdp", "model")),
  (r"memory_([kv]|slots|weights/\d+)$", ("model", None, None)),
  (r"memory_biases/\d+$", ("model", None)),
)


def path_of(path: tuple[Any, ...]) -> str:
  """Returns a key path of `jax.tree_util` as names joined by slashes, without `value` wrappers."""
  names = (str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
  return "/".join(n for n in names if n not in ("value", "raw_value"))


def param_spec(path: str, shape: tuple[int, ...], mesh: Any) -> P:
  """Returns the PartitionSpec of one parameter; an axis that does not divide it is left out."""
  sizes = dict(mesh.shape)
  fits = lambda n, axis: axis in sizes and n % sizes[axis] == 0
  for pattern, axes in _RULES:
    if re.search(pattern, path) and len(shape) >= len(axes):
      spec = [None] * (len(shape) - len(axes)) + list(axes)
      return P(*(a if a and fits(n, a) else None for n, a in zip(shape, spec)))
  return P()


def param_specs(params: Any, mesh: Any) -> Any:
  """Returns a pytree of PartitionSpec for (abstract) parameters, of the same structure."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: param_spec(path_of(path), x.shape, mesh), params
  )


# Axes that split the rows of a batch, and the heads.
ROWS, HEADS = ("data", "fsdp"), ("model",)
BATCH = P(ROWS)


def explicit(x: Array) -> NamedSharding | None:
  """Returns the sharding in x's type, None where there is no mesh of Explicit axes.

  On Explicit axes arrays of one expression must agree; on Auto axes the compiler sees to it.
  """
  sharding = jax.typeof(x).sharding
  has = not sharding.mesh.empty and AxisType.Explicit in sharding.mesh.axis_types
  return sharding if has else None


def like(tree: Any, x: Array) -> Any:
  """Returns the tree with the leaves' leading axes, and the last of a leaf of x's rank, as x's."""
  sharding = explicit(x)
  if sharding is None:
    return tree

  def place(leaf):
    spec = [sharding.spec[0], *(None,) * (leaf.ndim - 1)]
    if leaf.ndim == x.ndim:
      spec[-1] = sharding.spec[-1]
    return jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, P(*spec)))

  return jax.tree.map(place, tree)


def along(tree: Any, x: Array, axes: tuple[int | None, ...]) -> Any:
  """Returns the tree with the leaves' leading axes placed as these axes of x; None is whole."""
  sharding = explicit(x)
  if sharding is None:
    return tree
  spec = P(*(None if i is None else sharding.spec[i] for i in axes))
  return jax.tree.map(
    lambda leaf: jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, spec)), tree
  )

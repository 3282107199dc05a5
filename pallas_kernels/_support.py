"""What the kernels of every backend accept."""

import jax

WIDTHS, SLOTS, CHUNKS = (64, 128), (32, 64, 128), (16, 32, 64)
ACTIVATIONS = ("identity", "silu", "ln_silu", "l2_silu")
DTYPES = ("bfloat16", "float32")


def _platform() -> str:
  """Returns where a call would run: the mesh's device if it names one, else JAX's default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def reasons(spec, shapes, platforms: tuple[str, ...] | None) -> str | None:
  """Returns None, or every reason why a backend's kernels cannot run a call here.

  Args:
    spec, shapes: as `trellis_jax.ops.backends` has them.
    platforms: where the backend runs; None for an interpreter, which runs anywhere.
  """
  checks = [] if platforms is None else [("platform", _platform(), platforms)]
  checks += [("D", shapes.D, WIDTHS), ("V", shapes.V, WIDTHS), ("M", shapes.M, SLOTS)]
  checks += [("chunk_size", spec.chunk_size, CHUNKS), ("dtype", shapes.dtype, DTYPES)]
  checks += [(role, getattr(spec, role), ACTIVATIONS) for role in ("phi", "f", "phi_out")]
  found = [
    f"{name} is {given}, not one of {', '.join(map(str, accepted))}"
    for name, given, accepted in checks
    if given not in accepted
  ]
  return "; ".join(found) or None

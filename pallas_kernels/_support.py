"""What the kernels of every backend accept.

They are made for a few widths of keys and values. Others are filled up with zeros to the next one,
which changes no number: columns that nothing is written into stay zero, and no sum sees them.
"""

from pallas_kernels._platform import platform

WIDTHS, SLOTS, CHUNKS = (64, 128), (32, 64, 128), (16, 32, 64)
ACTIVATIONS = ("identity", "silu", "ln_silu", "l2_silu")
DTYPES = ("bfloat16", "float32")
MEANS = ("ln_silu",)  # activations that depend on how many features there are


def widths(spec, shapes) -> tuple[int, int]:
  """Returns the widths of keys and values that the kernels run a call with."""
  fit = lambda width: next((w for w in WIDTHS if width <= w), width)
  return fit(shapes.D), shapes.V if spec.phi_out in MEANS else fit(shapes.V)


def reasons(spec, shapes, platforms: tuple[str, ...] | None) -> str | None:
  """Returns None, or every reason why a backend's kernels cannot run a call here.

  Args:
    spec, shapes: as `trellis_jax.ops.backends` has them.
    platforms: where the backend runs; None for an interpreter, which runs anywhere.
  """
  checks = [] if platforms is None else [("platform", platform(), platforms)]
  checks += [("M", shapes.M, SLOTS)]
  checks += [("chunk_size", spec.chunk_size, CHUNKS), ("dtype", shapes.dtype, DTYPES)]
  checks += [(role, getattr(spec, role), ACTIVATIONS) for role in ("phi", "f", "phi_out")]
  found = [
    f"{name} is {given}, not one of {', '.join(map(str, accepted))}"
    for name, given, accepted in checks
    if given not in accepted
  ]
  d, v = widths(spec, shapes)
  most = max(WIDTHS)
  found += [f"{name} is {n}, more than {most}" for name, n in (("D", d), ("V", v)) if n > most]
  if v < most and v not in WIDTHS:
    found.append(f"V is {v} and phi_out {spec.phi_out}, whose mean is over V: not one of {WIDTHS}")
  return "; ".join(found) or None

"""Pallas kernels of the Trellis op, one file per backend; imports jax alone.

Each file holds the functions that `trellis_jax.ops.backends` describes: `supports`, `forward`,
`backward`, and `step` and `widths` where it has them. A new file is picked up by its name; files
that begin with an underscore are parts of one. What no backend supports runs as the `jax.lax.scan`
over chunks of `trellis_jax/ops/chunked.py`.
"""

from pallas_kernels._platform import platform

__all__ = ["platform"]

"""Where a call would run."""

import jax


def platform() -> str:
  """Returns the platform of the mesh's device if it names one, else of JAX's default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform

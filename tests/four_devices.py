"""Runs a program on four host devices: they are counted when JAX starts, so in its own process."""

import os
import subprocess
import sys


def run(program: str, *argv: str) -> None:
  """Runs the program, which can import the package and the tests' modules; fails where it does."""
  here = os.path.dirname(__file__)
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
  path = os.pathsep.join([os.path.dirname(here), here])
  check = "\nassert len(jax.devices()) == 4\nprint('done')\n"
  done = subprocess.run(
    [sys.executable, "-c", program + check, *argv],
    env=dict(os.environ, XLA_FLAGS=flags, PYTHONPATH=path),
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout == "done\n"

"""Where numbers come from, and files that are whole or absent."""

import contextlib
import fcntl
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator

import jax

ROOT = pathlib.Path(__file__).parent.parent


def machine() -> str:
  """What times depend on: the machine, its devices and jax, in a line."""
  device = jax.devices()[0]
  kind = device.device_kind if device.platform != "cpu" else f"CPU, {os.cpu_count()} cores"
  return f"{platform.machine()}, {kind}, jax {jax.__version__}"


def revision(*folders: str, root: pathlib.Path = ROOT) -> str:
  """The commit of a checkout, with "+changes" when the folders differ from it, or "unknown"."""

  def git(*args):
    done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if not done.returncode else ""

  if not (root / ".git").exists():  # a copy inside of another checkout
    return "unknown"
  return git("rev-parse", "--short", "HEAD") + "+changes" * bool(
    git("status", "--porcelain", "--", *folders)
  )


@contextlib.contextmanager
def sole_writer(path: pathlib.Path) -> Iterator[None]:
  """Keeps others who ask so too out of a file's folder, while its lines are read and written."""
  path.parent.mkdir(parents=True, exist_ok=True)
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    fcntl.flock(folder, fcntl.LOCK_EX)
    yield
  finally:
    os.close(folder)


def write(path: pathlib.Path, text: str) -> None:
  """Writes a file at once, so that whoever is stopped leaves the old one or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  partial.write_text(text)
  os.replace(partial, path)

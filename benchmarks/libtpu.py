"""Google's TPU compiler on a machine without a TPU: where it is, and what keeps it quiet.

    pip install --no-deps --target .venv/libtpu libtpu

It is kept off the path of Python, because JAX takes an installed libtpu for a TPU and holds its
lock file: two trainings on one machine would be in each other's way.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys

FOLDER = pathlib.Path(sys.prefix) / "libtpu"


def library() -> str | None:
  """Returns the path of libtpu.so, or None."""
  spec = importlib.util.find_spec("libtpu")
  folders = [FOLDER / "libtpu", *(spec.submodule_search_locations if spec else ())]
  found = [p for folder in folders if (p := pathlib.Path(folder) / "libtpu.so").exists()]
  return str(found[0]) if found else None


def version() -> str | None:
  """Returns the version of the libtpu that `library` found, or None."""
  path = library()
  folders = [str(pathlib.Path(path).parent.parent)] if path else []
  found = importlib.metadata.distributions(name="libtpu", path=folders)
  return next((d.version for d in found), None)


def environment(*arguments: str) -> dict[str, str]:
  """Returns the environment of a process that compiles for TPUs and runs on the CPU.

  Flags of XLA's CPU compiler are left out: libtpu reads them, too, and stops at one it has not got.

  Args:
    *arguments: libtpu's own flags, read when it is loaded.
  """
  flags = os.environ.get("XLA_FLAGS", "").split()
  return dict(
    os.environ,
    XLA_FLAGS=" ".join(flag for flag in flags if not flag.startswith("--xla_cpu_")),
    JAX_PLATFORMS="cpu",
    TPU_LIBRARY_PATH=library() or "",
    LIBTPU_INIT_ARGS=" ".join(arguments),
    # Another process may have it loaded; there is no metadata server to ask.
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
  )

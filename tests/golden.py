"""Published data and outputs of other programs, which tests compare with and do not come along.

They lie in the folder that the environment names as TRELLIS_TEST_DATA, or in `shared/data` beside
the repository. A test that asks for one that is not there is skipped.
"""

import os
import pathlib

import pytest

BESIDE = pathlib.Path(__file__).parent.parent.parent / "shared" / "data"


def golden(name: str) -> pathlib.Path:
  """The path of `name` in that folder."""
  path = pathlib.Path(os.environ.get("TRELLIS_TEST_DATA") or BESIDE) / name
  if not path.exists():
    pytest.skip(f"{name} is not here; TRELLIS_TEST_DATA names the folder that holds it")
  return path

"""The house's rules that a machine can check: who imports whom, how long files are."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FORBIDDEN = {
  "pallas_kernels": ("trellis_jax", "experiments", "flax", "optax", "grain", "orbax", "absl"),
  "trellis_jax": ("experiments", "grain", "orbax", "absl", "optax", "ml_collections", "etils"),
  "experiments": (),
}
FILES = [p for folder in FORBIDDEN for p in sorted((ROOT / folder).rglob("*.py"))]


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: imports are absolute"
      yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_run_one_way_and_files_are_short(path):
  package = path.relative_to(ROOT).parts[0]
  for module in _imports(path):
    assert module.split(".")[0] not in FORBIDDEN[package], f"{path} imports {module}"
  assert path.read_text().count("\n") <= 400


def test_the_library_imports_with_jax_and_flax_alone():
  # flax itself brings orbax and optax along, so what is blocked is what flax does not need.
  program = 'import sys\nfor name in ("grain", "ml_collections", "tokenizers", "tensorboardX"):\n'
  program += "  sys.modules[name] = None\nimport trellis_jax, pallas_kernels\n"
  program += 'assert "experiments" not in sys.modules\n'
  subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)

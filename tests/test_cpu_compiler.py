"""XLA's CPU compiler does not get the op wrong."""

import os
import pathlib
import subprocess
import sys

import pytest

from trellis_jax import cpu_compiler

OFF = f"{cpu_compiler.FLAG}=-reduce"
# 64 rows of one chunk, outputs alone. The definition, token by token, is the other program.
PROGRAM = """
import jax
import jax.numpy as jnp
from trellis_jax import trellis

def op(implementation):
  call = lambda *x: trellis(*x, chunk_size=64, curvature=1.0, implementation=implementation)[0]
  return jax.jit(call)

keys = jax.random.split(jax.random.key(0), 4)
q, k, v, a = (jax.random.normal(key, (64, 64, 1, n)) for key, n in zip(keys, (48, 48, 96, 32)))
unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
gate = jnp.ones((64, 64, 1))
x = (unit(q), unit(k), unit(v), a, -0.02 * gate, 0.5 * gate)
assert jnp.max(jnp.abs(op("xla")(*x) - op("reference")(*x))) < 1e-3
"""


def test_outputs_alone_of_many_rows_in_a_fresh_process():
  skip = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
  env = {name: value for name, value in os.environ.items() if name not in skip}
  root = pathlib.Path(__file__).parent.parent
  subprocess.run([sys.executable, "-c", PROGRAM], check=True, env=env, cwd=root)


@pytest.mark.parametrize("given", ["", "--xla_dump_to=x"])
@pytest.mark.parametrize("jaxlib", ["0.10.2", "0.11.0", "0.12.0.1"])
def test_the_flag_is_added_to_what_is_there(given, jaxlib):
  got = cpu_compiler.flags({"XLA_FLAGS": given}, jaxlib, libtpu=False)
  assert got.split() == [*given.split(), OFF]


def test_a_flag_that_is_there_stays():
  given = f"{cpu_compiler.FLAG}=dot,reduce --xla_dump_to=x"
  assert cpu_compiler.flags({"XLA_FLAGS": given}, "0.10.2", libtpu=False) == given


@pytest.mark.parametrize("jaxlib", ["0.9.2", "0.13.0"])
def test_other_versions_do_not_see_it(jaxlib):
  assert cpu_compiler.flags({}, jaxlib, libtpu=False) == ""


def test_libtpu_does_not_see_it():
  assert cpu_compiler.flags({}, "0.10.2", libtpu=True) == ""
  assert cpu_compiler.flags({"TPU_LIBRARY_PATH": "x"}, "0.10.2", libtpu=False) == ""
  assert cpu_compiler.flags({"JAX_PLATFORMS": "cpu"}, "0.10.2", libtpu=True) == OFF

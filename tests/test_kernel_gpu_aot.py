"""A training step over eight H200s, compiled by XLA for GPUs on a machine without one."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = """
import json, re
import jax, mixer_step, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

H200 = '''gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"'''
topology = topologies.get_topology_desc("eight", "cuda", target_config=H200, topology="1x1x8")
devices = np.array(topology.devices).reshape(4, 2)
mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
step, params, x = mixer_step.step_and_arguments(mesh, tokens=512)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
  done = jax.jit(step).trace(params, x).lower(lowering_platforms=("cuda",)).compile()
text, memory = done.as_text(), done.memory_analysis()
count = lambda name: len(re.findall(rf"{name}(?:-start)?[(]", text))
print(json.dumps(dict(
  kernels=text.count("__gpu$xla"), arguments=memory.argument_size_in_bytes,
  temp=memory.temp_size_in_bytes, moves=count("all-to-all") + count("collective-permute"),
)))
"""


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="XLA for GPUs (jax-cuda13-plugin, jax-cuda13-pjrt) is not installed",
)
def test_a_training_step_over_eight_gpus_compiles():
  here = pathlib.Path(__file__).parent
  more = {"CUDA_VISIBLE_DEVICES": "-1", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}
  more |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    env={**os.environ, **more},
    capture_output=True,
    text=True,
  )
  assert not done.returncode, done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  # Three launches forward, six backward; no row and no head moves to another device.
  assert found["kernels"] == 9 and found["moves"] == 0
  # 2 rows of 512 tokens and 2 heads a device: far from the whole batch.
  assert found["temp"] < 100e6

"""Packaging: trellis_jax (the library), pallas_kernels (its kernels), experiments (training)."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "trellis_jax/version.py").read_text()).group(1)

# The library needs jax and flax alone; everything else is an extra.
TRAIN = [
  "absl-py>=2.1",
  "etils[epath]>=1.9",
  "grain>=0.2.12",
  "matplotlib>=3.8",
  "ml-collections>=1.0",
  "optax>=0.2.5",
  "orbax-checkpoint>=0.11.20",
  "rich>=13.7",
  "tabulate>=0.9",
  "tensorboardX>=2.6",
  "tokenizers>=0.20",
  "zstandard>=0.22",
]
DEV = ["hypothesis>=6.100", "pytest>=8", "pytest-xdist>=3.5", "ruff>=0.9"]

setuptools.setup(
  name="trellis-jax",
  version=VERSION,
  description="Trellis: attention with a bounded key-value memory that learns at test time, in JAX",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["trellis_jax*", "pallas_kernels*", "experiments*"]),
  install_requires=["jax>=0.10.2,<0.13", "flax>=0.12.8", "jaxtyping>=0.2.34", "numpy>=2.0"],
  extras_require={
    "gpu": ["jax[cuda13]>=0.10.2,<0.13"],
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "train": TRAIN,
    "wandb": ["wandb>=0.17"],
    "eval": [*TRAIN, "lm_eval>=0.4.9"],  # its core: no torch
    "dev": TRAIN + DEV,
  },
)

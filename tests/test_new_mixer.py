"""docs/new_mixer.md: its example, saved as one file and with no other touched, is a mixer."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from experiments import config
from trellis_jax import LM, generate, mixers

jax.config.update("jax_numpy_rank_promotion", "raise")
assert "ema" in mixers.names()
for pattern in ("ema", "ema,attention"):
  flags = ["--config.model.mixer=" + pattern, "--config.model.ema.decay=0.8"]
  flags += ["--config.model.width=16", "--config.model.num_layers=2"]
  cfg = config.lm_config(config.parse(["", *flags]).model, 19)
  assert cfg.mixers["ema"]["decay"] == 0.8
  lm = LM(cfg, rngs=nnx.Rngs(0))
  run = nnx.jit(lambda lm, tokens, state=None, ids=None: lm(tokens, state, segment_ids=ids))
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 19)
  whole, final = run(lm, tokens)
  first, state = run(lm, tokens[:, :5])
  second, state = run(lm, tokens[:, 5:], state)
  near(jnp.concatenate([first, second], axis=1), whole)
  jax.tree.map(near, state, final)
  ids = jnp.asarray([[0] * 2 + [1] * 4 + [2] * 5 + [0], [3] * 12])
  packed, _ = run(lm, tokens, None, ids)
  near(packed[:1, 6:11], run(lm, tokens[:1, 6:11])[0])
  near(packed[1:], whole[1:])
  graph, params = nnx.split(lm)
  grads = jax.grad(lambda p: jnp.sum(jax.nn.log_softmax(nnx.merge(graph, p)(tokens)[0])[..., 3]))
  assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(grads(params)))
  assert len(generate(lm, [[1, 2, 3], [4]], max_new_tokens=3)[1]) == 3
  assert lm.flops(8) > 0 and lm.state_size() > 0
print("a mixer")
"""


def test_the_example_is_a_mixer(tmp_path):
  text = (ROOT / "docs" / "new_mixer.md").read_text()
  name = re.search(r"Save this as `(trellis_jax/mixers/\w+\.py)`", text)[1]
  for package in ("trellis_jax", "pallas_kernels", "experiments"):
    shutil.copytree(
      ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
    )
  assert not (tmp_path / name).exists()
  (tmp_path / name).write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
  env = os.environ | {"PYTHONPATH": str(tmp_path)}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=env, capture_output=True, text=True
  )
  assert done.stdout == "a mixer\n", done.stderr
  check = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), name]
  assert subprocess.run(check, cwd=tmp_path).returncode == 0

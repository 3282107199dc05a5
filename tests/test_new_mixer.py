"""docs/new_mixer.md: its examples, each saved as one file with no other touched, are mixers."""

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
for pattern in ("fading", "ema", "ema,fading,attention"):
  name = pattern.split(",")[0]
  assert name in mixers.names()
  flags = ["--config.model.mixer=" + pattern, f"--config.model.{name}.decay=0.8"]
  flags += ["--config.model.width=16", f"--config.model.num_layers={len(pattern.split(','))}"]
  cfg = config.lm_config(config.parse(["", *flags]).model, 19)
  assert cfg.mixers[name]["decay"] == 0.8
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


def test_the_examples_are_mixers(tmp_path):
  text = (ROOT / "docs" / "new_mixer.md").read_text()
  saved = r"Save this as `(trellis_jax/mixers/\w+\.py)`.*?```python\n(.*?)```"
  examples = dict(re.findall(saved, text, re.DOTALL))
  assert len(examples) == 2
  short = min(examples.values(), key=len)
  assert sum(bool(line.strip()) for line in short.splitlines()) <= 20
  for package in ("trellis_jax", "pallas_kernels", "experiments"):
    shutil.copytree(
      ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
    )
  for name, code in examples.items():
    assert not (tmp_path / name).exists()
    (tmp_path / name).write_text(code)
  env = os.environ | {"PYTHONPATH": str(tmp_path)}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=env, capture_output=True, text=True
  )
  assert done.stdout == "a mixer\n", done.stderr
  check = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml")]
  assert subprocess.run([*check, *examples], cwd=tmp_path).returncode == 0

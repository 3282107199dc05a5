"""Checkpoints: what is kept, what is refused, what a mesh of another shape reads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoint, optim
from experiments.configs import default
from experiments.errors import UserError

jax.config.update("jax_numpy_rank_promotion", "raise")

CORPUS = {"corpus": "c0ffee", "tokenizer": "beef"}


def _params(seed=0):
  key = jax.random.key(seed)
  return {"blocks": {0: {"kernel": jax.random.normal(key, (4, 6))}}, "norm": {"scale": jnp.ones(4)}}


def _state(seed=0):
  params = _params(seed)
  return params, optim.optimizer(default.get_config().optim, 1000).init(params)


def _about(cfg=None, params=None, corpus=CORPUS):
  return checkpoint.about(cfg or default.get_config(), params or _params(), corpus)


def _save(workdir, steps=(3,), keep=2):
  with checkpoint.Checkpoints(workdir, keep) as checkpoints:
    for n in steps:
      checkpoints.save(n, *_state(seed=n), _about() | {"data": {"next_index": n}})


def test_a_checkpoint_gives_back_what_was_saved(tmp_path):
  _save(tmp_path, [3, 5])
  assert checkpoint.latest_step(tmp_path) == 5
  assert checkpoint.read_about(tmp_path, 5)["data"] == {"next_index": 5}
  params, opt_state = _state(seed=5)
  abstract = jax.eval_shape(lambda: _state())
  restored = checkpoint.restore(tmp_path, 5, params=abstract[0], opt_state=abstract[1])
  alone = checkpoint.restore(tmp_path, 3, params=abstract[0])
  jax.tree.map(np.testing.assert_array_equal, restored, {"params": params, "opt_state": opt_state})
  assert jax.tree.structure(restored["opt_state"]) == jax.tree.structure(opt_state)
  jax.tree.map(np.testing.assert_array_equal, alone, {"params": _params(seed=3)})


def test_saved_arrays_may_be_donated_at_once(tmp_path):
  params, opt_state = _state()
  want = jax.tree.map(np.array, params)
  spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
  with checkpoint.Checkpoints(tmp_path, 1) as checkpoints:
    checkpoints.save(1, params, opt_state, _about())
    jax.block_until_ready(spoil(params))
  restored = checkpoint.restore(tmp_path, 1, params=jax.eval_shape(lambda: _params()))
  jax.tree.map(np.testing.assert_array_equal, restored["params"], want)


def test_only_the_newest_are_kept(tmp_path):
  _save(tmp_path, [1, 2, 3, 4], keep=2)
  assert sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()) == ["3", "4"]


def test_what_a_kill_leaves_is_passed_over_and_cleaned_up(tmp_path):
  _save(tmp_path, [3, 5])
  folder = tmp_path / checkpoint.FOLDER
  (folder / "7.orbax-checkpoint-tmp-12").mkdir()  # a write that was cut
  (folder / "3" / "_CHECKPOINT_METADATA").unlink()  # a deletion that was cut
  assert checkpoint.latest_step(tmp_path) == 5
  _save(tmp_path, [7], keep=1)
  assert [p.name for p in folder.iterdir()] == ["7"]


def test_no_checkpoint_is_none_and_makes_no_folder(tmp_path):
  assert checkpoint.latest_step(tmp_path / "run") is None
  (tmp_path / checkpoint.FOLDER).mkdir()
  assert checkpoint.latest_step(tmp_path) is None
  assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
  _save(tmp_path)
  folder = tmp_path / checkpoint.FOLDER / "3"
  (folder / "about" / "metadata").write_text("{")
  with pytest.raises(UserError, match="3 cannot be read"):
    checkpoint.read_about(tmp_path, 3)
  for path in (folder / "params").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  with pytest.raises(UserError, match="3 cannot be read"):
    checkpoint.restore(tmp_path, 3, params=jax.eval_shape(lambda: _params()))


def _refusal(saved, given):
  with pytest.raises(UserError) as e:
    checkpoint.check_continues(saved, given, "runs/x")
  return str(e.value)


@pytest.mark.parametrize(
  "field, value",
  [
    ("seed", 1), ("batch_size", 16), ("seq_len", 512), ("data.packing", "concat"),
    ("data.align", 16), ("data.vocab_size", 512), ("data.tokenizer", "byte"), ("model.width", 512),
    ("model.num_layers", 2), ("model.tie_embeddings", False), ("model.trellis.chunk_size", 1),
    ("model.trellis.phi", "silu"),
  ],
)  # fmt: skip
def test_another_run_is_refused_by_the_names_of_what_differs(field, value):
  cfg = default.get_config()
  old = checkpoint.flatten(cfg.to_dict())[field]
  cfg.update_from_flattened_dict({field: value})
  message = _refusal(_about(), _about(cfg))
  assert f"{field} = {old} (here {value})" in message
  assert message.count(" = ") == 1


@pytest.mark.parametrize(
  "field, value",
  [
    ("steps", 5000), ("workdir", "moved"), ("grad_accum", 2), ("mesh.fsdp", 2), ("eval.every", 7),
    ("optim.peak_lr", 1e-4), ("optim.schedule", "wsd"), ("model.remat", "full"),
    ("model.dtype", "bfloat16"), ("data.path", "moved"), ("data.cache", "moved"), ("log.every", 3),
    ("checkpoint.keep", 9), ("profile.start", 3), ("distributed.process_id", 1),
  ],
)  # fmt: skip
def test_a_run_may_go_on_longer_faster_and_elsewhere(field, value):
  cfg = default.get_config()
  cfg.update_from_flattened_dict({field: value})
  checkpoint.check_continues(json.loads(json.dumps(_about())), _about(cfg), "runs/x")


def test_every_field_that_may_change_exists():
  fields = checkpoint.flatten(default.get_config().to_dict())
  for name in checkpoint.FREE:
    assert any(field.startswith(name) for field in fields), name


def test_knobs_of_mixers_that_the_model_has_not_do_not_bind():
  saved = _about()
  saved["config"]["model"]["other"] = {"knob": 1}
  checkpoint.check_continues(saved, _about(), "runs/x")
  saved["config"]["model"]["mixer"] = "trellis,other"
  assert "model.mixer = trellis,other (here trellis)" in _refusal(saved, _about())


def test_other_data_and_another_architecture_are_refused():
  other = _about(corpus=CORPUS | {"corpus": "d1ff"})
  assert "corpus = c0ffee (here d1ff)" in _refusal(_about(), other)
  params = _params()
  params["blocks"][0]["kernel"] = jnp.zeros((4, 8))
  message = _refusal(_about(), _about(params=params))
  assert "blocks.0.kernel = 4x6 float32 (here 4x8 float32)" in message


def test_several_differences_are_all_named():
  cfg = default.get_config()
  cfg.seed, cfg.model.width = 5, 64
  message = _refusal(_about(), _about(cfg))
  assert "model.width" in message and "seed" in message and "runs/x" in message

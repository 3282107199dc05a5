"""Checkpoints: parameters, optimiser, data position and config, written whole or not at all.

Orbax writes `workdir/checkpoints/<step>` in the background under a temporary name and renames it
when it is complete, so a kill at any time leaves the checkpoints before it. Beside the arrays lies
what they belong to, `about`, in JSON: a run that goes on must match it.
"""

import hashlib
import json
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from experiments.errors import UserError

FOLDER = "checkpoints"

# Config fields that may change between a checkpoint and the run that goes on from it: they say how
# long, how fast and where a run goes, not which one it is. The learning rate's are among them,
# because a longer run and wsd's decay need them; where the data lies is, because `corpus` tells
# whether it is the same data.
FREE = (
  "checkpoint.", "data.cache", "data.path", "data.text_field", "distributed.", "eval.",
  "grad_accum", "log.", "mesh.", "model.dtype", "model.remat", "model.scan_layers", "optim.",
  "profile.", "steps", "workdir",
)  # fmt: skip


class Checkpoints:
  """The checkpoints of one run; leaving this context waits for the last one to be written."""

  def __init__(self, workdir: pathlib.Path, keep: int):
    self.folder = pathlib.Path(workdir).absolute() / FOLDER
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    self.manager = ocp.CheckpointManager(self.folder, options=options)

  def save(self, step: int, params: Any, opt_state: Any, about: dict[str, Any]) -> None:
    """Starts to write a checkpoint; waits for the one before it, and until the arrays are read."""
    items = {"params": ocp.args.StandardSave(params), "about": ocp.args.JsonSave(about)}
    items["opt_state"] = ocp.args.StandardSave(opt_state)
    self.manager.save(step, args=ocp.args.Composite(**items), force=True)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self.manager.close()


def latest_step(workdir: pathlib.Path) -> int | None:
  """The step of the last complete checkpoint, None without one; changes nothing on disk."""
  folder = pathlib.Path(workdir) / FOLDER
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return max((int(name) for name in names if name.isdecimal()), default=None)


def restore(workdir: pathlib.Path, step: int, **items: Any) -> dict[str, Any]:
  """Reads `params` or `opt_state` or both, as the given trees of shapes and shardings."""
  folder = pathlib.Path(workdir).absolute() / FOLDER / str(step)
  with ocp.StandardCheckpointer() as reader:
    try:
      return {name: reader.restore(folder / name, item) for name, item in items.items()}
    except (OSError, ValueError, KeyError) as e:
      raise UserError(
        f"checkpoint {folder} cannot be read ({e}); delete it to go on without"
      ) from e


def read_about(workdir: pathlib.Path, step: int) -> dict[str, Any]:
  """What a checkpoint belongs to, see `about`."""
  folder = pathlib.Path(workdir) / FOLDER / str(step)
  try:
    return json.loads((folder / "about" / "metadata").read_text())
  except (OSError, ValueError) as e:
    raise UserError(f"checkpoint {folder} cannot be read ({e}); delete it to go on without") from e


def about(cfg: ml_collections.ConfigDict, params: Any, corpus: dict[str, str]) -> dict[str, Any]:
  """What a checkpoint belongs to: the config, the architecture (names and shapes), the corpus."""
  shapes = {name: describe(x) for name, x in named_leaves(params).items()}
  digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
  config = json.loads(json.dumps(cfg.to_dict()))  # tuples become lists, as they do on disk
  architecture = {"digest": digest, "parameters": shapes}
  return {"config": config, "architecture": architecture, "corpus": corpus}


def check_continues(saved: dict[str, Any], given: dict[str, Any], workdir: pathlib.Path) -> None:
  """Raises UserError, naming all that differs, unless a run with `given` may go on from `saved`."""
  differing = differences(binding_fields(saved["config"]), binding_fields(given["config"]))
  if saved["corpus"] != given["corpus"]:
    differing += differences(saved["corpus"], given["corpus"])
  # The architecture follows from the config unless the code has changed; then its parameters tell.
  if not differing and saved["architecture"]["digest"] != given["architecture"]["digest"]:
    parameters = lambda x: x["architecture"]["parameters"]
    differing = differences(parameters(saved), parameters(given))
  if differing:
    raise UserError(
      f"{workdir} holds the checkpoint of another run, with {', '.join(differing)}; "
      "give the same values or another config.workdir"
    )


def binding_fields(config: dict[str, Any]) -> dict[str, Any]:
  """The fields of a run that stay as they are, flat; knobs of what it has not are none."""
  used = {"model": [name.strip() for name in config["model"]["mixer"].split(",")]}
  used["data"] = [config["data"]["task"]]
  unused = [
    f"{section}.{k}."
    for section, names in used.items()
    for k, v in config[section].items()
    if isinstance(v, dict) and k not in names
  ]
  free = FREE + tuple(unused)
  return {k: v for k, v in flatten(config).items() if not k.startswith(free)}


def differences(saved: dict[str, Any], given: dict[str, Any]) -> list[str]:
  """A phrase for each key that has different values in two flat dicts."""
  both = ((k, saved.get(k, "absent"), given.get(k, "absent")) for k in sorted({*saved, *given}))
  return [f"{k} = {old} (here {new})" for k, old, new in both if old != new]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """A nested dict with dotted keys."""
  flat = {}
  for key, value in tree.items():
    name = f"{prefix}{key}"
    flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
  return flat


def named_leaves(tree: Any) -> dict[str, Any]:
  """The leaves of a nested dict by their dotted names."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def describe(x: Any) -> str:
  """Shape and dtype, "64x512 float32"."""
  return f"{'x'.join(map(str, x.shape)) or 'scalar'} {np.dtype(x.dtype).name}"

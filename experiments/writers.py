"""Where records go besides `metrics.jsonl`: TensorBoard events, and W&B when asked for."""

import importlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments import metrics
from experiments.errors import UserError


class TensorBoardWriter:
  """Writes the records as scalars; events of steps after `start` are marked as taken back."""

  def __init__(self, folder: pathlib.Path, start: int):
    from tensorboardX import SummaryWriter

    self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

  def write(self, record: Mapping[str, float]) -> None:
    for name, value in record.items():
      if name != "step":
        self.writer.add_scalar(name, value, record["step"])

  def close(self) -> None:
    self.writer.close()


class WandbWriter:
  """Sends the records to a Weights & Biases project, on resume to the same run there."""

  def __init__(self, workdir: pathlib.Path, project: str, config: dict[str, Any]):
    wandb = _import_wandb()
    id_file = workdir / "wandb_id"
    if not id_file.exists():
      id_file.write_text(os.urandom(8).hex())
    self.run = wandb.init(
      project=project,
      name=workdir.name,
      id=id_file.read_text(),
      resume="allow",
      dir=str(workdir),
      config=config,
    )

  def write(self, record: Mapping[str, float]) -> None:
    fields = {k: v for k, v in record.items() if k != "step"}
    self.run.log(fields, step=record["step"])

  def close(self) -> None:
    self.run.finish()


def check(cfg: ml_collections.ConfigDict) -> None:
  """Raises UserError when a writer that `cfg.log` asks for cannot be made."""
  if cfg.wandb:
    _import_wandb()


def open_all(
  workdir: pathlib.Path, cfg: ml_collections.ConfigDict, start: int
) -> list[metrics.Writer]:
  """The writers of a run that goes on after step `start`, which later records are dropped for."""
  metrics.truncate(workdir / metrics.JSONL, start)
  writers: list[metrics.Writer] = [metrics.JsonlWriter(workdir / metrics.JSONL)]
  if cfg.log.tensorboard:
    writers.append(TensorBoardWriter(workdir / "tensorboard", start))
  if cfg.log.wandb:
    writers.append(WandbWriter(workdir, cfg.log.wandb, cfg.to_dict()))
  return writers


def _import_wandb():
  try:
    return importlib.import_module("wandb")
  except ImportError as e:
    raise UserError(
      "config.log.wandb needs the package wandb: `pip install wandb`, or leave the field empty"
    ) from e

"""The common-sense tasks of lm-evaluation-harness on local files, TASK_SPLIT.jsonl in a folder.

Prompts, choices and metrics are those of the stock tasks of the installed harness; only where the
examples come from is another. A line has the fields of the stock data set, at least those that the
task reads.
"""

import importlib.util
import json
import pathlib

from experiments.errors import UserError


class Task:
  """A stock task: its yaml, the split it is scored on, and the fields that it reads."""

  def __init__(self, yaml: str, split: str, fields: str, metric: str = "acc"):
    self.yaml, self.split, self.fields, self.metric = yaml, split, fields.split(), metric


# The metric of each is the one that papers report.
TASKS = {
  "lambada_openai": Task("lambada/lambada_openai.yaml", "test", "text"),
  "piqa": Task("piqa/piqa.yaml", "validation", "goal sol1 sol2 label"),
  "hellaswag": Task(
    "hellaswag/hellaswag.yaml",
    "validation",
    "activity_label ctx_a ctx_b endings label",
    "acc_norm",
  ),
  "winogrande": Task("winogrande/default.yaml", "validation", "sentence option1 option2 answer"),
  "arc_easy": Task("arc/arc_easy.yaml", "test", "question choices answerKey"),
  "arc_challenge": Task("arc/arc_challenge.yaml", "test", "question choices answerKey", "acc_norm"),
  "social_iqa": Task(
    "siqa/siqa.yaml", "validation", "context question answerA answerB answerC label"
  ),
  "boolq": Task("super_glue/boolq/default.yaml", "validation", "passage question label"),
}


def file_of(name: str, folder: pathlib.Path) -> pathlib.Path:
  """The file that holds a task's examples."""
  return folder / f"{name}_{TASKS[name].split}.jsonl"


def check_file(name: str, folder: pathlib.Path) -> int:
  """The number of a task's examples; UserError, naming the line, for a file that is bad."""
  path, number, fields = file_of(name, folder), 0, ", ".join(TASKS[name].fields)
  if not path.is_file():
    raise UserError(f"{path} does not exist; task {name} reads it")
  lines = path.read_bytes().splitlines()
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError as e:  # of which broken utf-8 is one
      raise UserError(f"{path}:{number}: not a line of JSON ({e})") from None
    if not isinstance(row, dict):
      raise UserError(f"{path}:{number}: no object; accepted is one with {fields}")
    if missing := [field for field in TASKS[name].fields if field not in row]:
      raise UserError(f"{path}:{number}: no field {missing[0]!r}; task {name} reads {fields}")
  if not number:
    raise UserError(f"{path} holds no examples")
  return number


def write(name: str, folder: pathlib.Path, out: pathlib.Path) -> None:
  """Writes the yaml of a task on a local file into the folder `out`, which also holds its cache."""
  stock = pathlib.Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
  split = TASKS[name].split
  data_files = {split: str(file_of(name, folder).absolute())}
  fields = {
    "include": str(stock / TASKS[name].yaml),
    "task": name,
    "dataset_path": "json",
    "dataset_name": None,
    "dataset_kwargs": {"data_files": data_files, "cache_dir": str(out / "cache")},
    "training_split": None,
    "validation_split": split if split == "validation" else None,
    "test_split": split if split == "test" else None,
  }
  # A JSON value is a YAML value.
  text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items())
  (out / f"{name}.yaml").write_text(text)

"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere."""

from collections.abc import Mapping

import rich.console
import rich.progress


class Console:
  """Shows the steps of a run of `total` steps that goes on after step `start`."""

  def __init__(self, start: int, total: int):
    self.total = total
    self.times: dict[str, float] = {}  # the latest speeds
    self.console = rich.console.Console(highlight=False, soft_wrap=True)
    self.progress = None
    if self.console.is_terminal:
      self.progress = rich.progress.Progress(
        rich.progress.TextColumn("step"),
        rich.progress.MofNCompleteColumn(),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.TextColumn("{task.fields[text]}"),
        rich.progress.TimeRemainingColumn(compact=True),
        console=self.console,
        expand=True,
      )
      self.task = self.progress.add_task("train", total=total, completed=start, text="compiling")
      self.progress.start()

  def say(self, text: str) -> None:
    """Prints a line, above the progress bar where there is one."""
    self.console.print(text, markup=False)

  def advance(self, record: Mapping[str, float]) -> None:
    """Moves the progress bar, where there is one, to a record's step."""
    self.times |= {k: v for k, v in record.items() if k.startswith("time/")}
    if self.progress:
      text = describe(self.times | {"train/loss": record["train/loss"]})
      self.progress.update(self.task, completed=record["step"], text=text)

  def write(self, record: Mapping[str, float]) -> None:
    """Prints a record; above a progress bar only those with an evaluation."""
    if not self.progress or "eval/loss" in record:
      left = eta(record, self.total)
      text = f"step {record['step']}/{self.total}  {describe(record)}"
      self.say(text + (f"  eta {left}" if left else ""))

  def close(self) -> None:
    if self.progress:
      self.progress.stop()


def describe(record: Mapping[str, float]) -> str:
  """The fields of a record that matter while a run goes on, in one line."""
  parts = [f"loss {record['train/loss']:.4f}"]
  if "eval/loss" in record:
    parts.append(f"held-out loss {record['eval/loss']:.4f} ppl {record['eval/perplexity']:.2f}")
    parts.append(f"accuracy {record['eval/accuracy']:.4f}")
  if "eval/bits_per_byte" in record:
    parts.append(f"{record['eval/bits_per_byte']:.4f} bits/byte")
  if "time/tokens_per_second" in record:
    parts.append(f"{si(record['time/tokens_per_second'])}tok/s")
    parts.append(f"{si(record['time/model_flops_per_second'])}FLOP/s")
  if "time/mfu" in record:
    parts.append(f"MFU {record['time/mfu']:.1%}")
  return "  ".join(parts)


def eta(record: Mapping[str, float], total: int) -> str:
  """Time left at the record's speed as h:mm:ss, empty when the speed is not known yet."""
  if "time/step_seconds" not in record:
    return ""
  seconds = round((total - record["step"]) * record["time/step_seconds"])
  return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def si(value: float) -> str:
  """A number with three digits and an SI prefix: 12300 -> '12.3 k'."""
  for prefix in ("", "k", "M", "G", "T", "P"):
    if abs(value) < 999.5 or prefix == "P":
      return f"{value:.3g} {prefix}"
    value /= 1000
  raise AssertionError("unreachable")

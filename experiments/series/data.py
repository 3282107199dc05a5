"""Series by the protocol of Long-term Series Forecasting: any CSV, its splits, scaler and windows.

A file has a header, one column of dates first and one number per channel and row. Splits are
consecutive: ETTh* 12/4/4 months of 30 days, ETTm* four times the rows, others 70/10/20 percent.
Validation and test begin `lookback` rows earlier, so that their first forecast is the first row
that is theirs. Every channel is standardised by mean and population deviation of the train rows,
and errors are those of standardised values.
"""

import csv
import dataclasses
import datetime
import pathlib
import re

import numpy as np

from experiments.errors import UserError

SPLITS = ("train", "validation", "test")
_MONTH = 30 * 24  # rows of an hourly series
_DAY = 24 * 60 * 60
_STAMPS = ("%Y-%m-%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y-%m-%d %H:%M", "%Y-%m-%d", "%Y/%m/%d")


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
  """A standardised series of N channels.

  Attributes:
    name: of the file.
    columns: of the channels.
    values: [rows, N] in units of the train rows' deviation, fp32.
    mean, std: of the train rows, in the file's units, fp64 [N].
    phase: of each row, its place in the day [rows], below `period`.
    period: rows of a day; 1 for a series that has no more than one a day.
    rows: of train, validation and test.
  """

  name: str
  columns: tuple[str, ...]
  values: np.ndarray
  mean: np.ndarray
  std: np.ndarray
  phase: np.ndarray
  period: int
  rows: tuple[int, int, int]

  def places(self, period: int) -> np.ndarray:
    """Place of each row [rows] in a cycle of `period` rows: of the day, or counted from row 0."""
    return self.phase if period == self.period else np.arange(len(self.phase)) % period

  def starts(self, split: str, lookback: int, horizon: int) -> np.ndarray:
    """First rows of a split's windows of `lookback` + `horizon` rows.

    Raises UserError when the split has no window.
    """
    at = SPLITS.index(split)
    first = sum(self.rows[:at]) - (lookback if at else 0)
    last = sum(self.rows[: at + 1]) - lookback - horizon
    if first < 0 or last < first:
      need = lookback + horizon if not at else max(horizon, 1)
      raise UserError(
        f"{self.name}: {split} has {self.rows[at]} rows, but lookback={lookback} and "
        f"horizon={horizon} need at least {need} there and {lookback} before it"
      )
    return np.arange(first, last + 1)


def load(path: str | pathlib.Path, *, rows: str = "", columns: str = "") -> Series:
  """Reads a series.

  Args:
    path: of the CSV.
    rows: "train,validation,test" rows; "" is what the protocol says of a file of this name.
    columns: names of the channels, separated by commas; "" is all.

  Raises:
    UserError: no such file, or something in it that is no series; says where.
  """
  path = pathlib.Path(path).expanduser()
  header, lines = _read(path)
  names = [name.strip() for name in columns.split(",")] if columns else header[1:]
  if missing := [name for name in names if name not in header[1:]]:
    raise UserError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(header[1:])}")
  table = _numbers(path, header, lines, [header.index(name) for name in names])
  parts = split_rows(path, len(table), rows)
  train = table[: parts[0]]
  mean, std = train.mean(0), train.std(0)
  std[std == 0] = 1.0  # a channel that never moves in train stays at 0
  phase, period = _phases(path, [line[0] for line in lines])
  values = ((table - mean) / std).astype(np.float32)
  return Series(path.stem, tuple(names), values, mean, std, phase, period, parts)


def split_rows(path: pathlib.Path, total: int, rows: str = "") -> tuple[int, int, int]:
  """Rows of train, validation and test; UserError when the file has fewer."""
  if rows:
    if not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*,\s*\d+\s*", rows):
      raise UserError(f"rows={rows!r} is given; accepted are three integers, such as 700,100,200")
    parts = tuple(int(n) for n in rows.split(","))
  elif match := re.match(r"ETT([hm])\d", path.stem):
    month = _MONTH * (4 if match[1] == "m" else 1)
    parts = (12 * month, 4 * month, 4 * month)
  else:
    train, test = int(0.7 * total), int(0.2 * total)
    parts = (train, total - train - test, test)
  if sum(parts) > total or min(parts) < 1:
    raise UserError(
      f"{path} is too short: it has {total} rows, but train, validation and test take "
      f"{', '.join(map(str, parts))}, each at least 1"
    )
  return parts


def _read(path: pathlib.Path) -> tuple[list[str], list[list[str]]]:
  """The header and the rows of a file, each as long as the header."""
  if not path.is_file():
    raise UserError(f"series {str(path)!r} does not exist; config.data.path names a CSV file")
  # Some published files have broken characters in the header.
  with path.open(newline="", encoding="utf-8-sig", errors="replace") as f:
    lines = [line for line in csv.reader(f) if line]
  if len(lines) < 2:
    raise UserError(f"{path} has no rows; accepted is a header and then one row per time")
  header = [name.strip() for name in lines.pop(0)]
  if len(header) < 2 or header[0].lower() not in ("date", "time", "timestamp"):
    raise UserError(
      f"{path} has columns {', '.join(header)}; accepted is date first and then the channels"
    )
  for number, line in enumerate(lines, 2):
    if len(line) != len(header):
      raise UserError(f"{path} line {number} has {len(line)} cells; its header has {len(header)}")
  return header, lines


def _numbers(path, header, lines, at: list[int]) -> np.ndarray:
  """The columns `at` as numbers [rows, N]."""
  cells = [[line[i] for i in at] for line in lines]
  try:
    table = np.array(cells, dtype=np.float64)
  except ValueError:
    table = np.array([[_number(cell) for cell in line] for line in cells])
  if len(bad := np.argwhere(~np.isfinite(table))):
    row, column = bad[0]
    raise UserError(
      f"{path} line {row + 2} column {header[at[column]]!r} is {cells[row][column]!r}, "
      f"but every value must be a finite number ({len(bad)} are not)"
    )
  return table


def _number(cell: str) -> float:
  try:
    return float(cell)
  except ValueError:
    return float("nan")


def _phases(path, stamps: list[str]) -> tuple[np.ndarray, int]:
  """(place of each row in its day, rows of a day)."""
  style = next((s for s in _STAMPS if _time(stamps[0], s)), None)
  if style is None:
    raise UserError(f"{path} line 2 has the date {stamps[0]!r}; accepted is e.g. 2016-07-01 00:00")
  step = _step(path, stamps[:3], style)
  if _DAY % step or step >= _DAY:
    return np.zeros(len(stamps), np.int32), 1
  seconds = np.array([_seconds(path, n, s, style) for n, s in enumerate(stamps, 2)])
  return (seconds // step).astype(np.int32), _DAY // step


def _time(stamp: str, style: str) -> datetime.datetime | None:
  try:
    return datetime.datetime.strptime(stamp.strip(), style)
  except ValueError:
    return None


def _step(path, stamps, style) -> int:
  """Seconds between the first two rows."""
  times = [_time(stamp, style) for stamp in stamps]
  if None in times or len(times) < 2 or times[1] <= times[0]:
    raise UserError(f"{path} has the dates {', '.join(stamps)}; accepted are dates that ascend")
  return int((times[1] - times[0]).total_seconds())


def _seconds(path, number: int, stamp: str, style: str) -> int:
  """Seconds of a stamp since midnight."""
  if (time := _time(stamp, style)) is None:
    raise UserError(f"{path} line {number} has the date {stamp!r}; the first is like {style}")
  return (time.hour * 60 + time.minute) * 60 + time.second

"""Series: splits, windows, scaler and phases by the protocol; bad files in one sentence."""

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.series import data


def _stamp(row, minutes=60):
  return str(np.datetime64("2016-07-01T00:00") + np.timedelta64(row * minutes, "m")).replace(
    "T", " "
  )


def _write(path, rows=200, columns=("a", "b"), minutes=60, cell=lambda row, at: row + 0.5 * at):
  lines = [",".join(("date", *columns))]
  for row in range(rows):
    cells = [str(cell(row, at)) for at in range(len(columns))]
    lines.append(",".join((_stamp(row, minutes), *cells)))
  path.write_text("\n".join(lines) + "\n")
  return path


@pytest.mark.parametrize(
  "name, horizon, validation, test",
  [
    ("ETTh1", 96, 2785, 2785),
    ("ETTh2", 192, 2689, 2689),
    ("ETTh1", 336, 2545, 2545),
    ("ETTh2", 720, 2161, 2161),
    ("ETTm1", 96, 11425, 11425),
  ],
)
def test_windows_of_the_named_files(name, horizon, validation, test, tmp_path):
  rows = data.split_rows(tmp_path / f"{name}.csv", 69680)
  series = data.Series(name, ("a",), None, None, None, None, 24, rows)
  assert len(series.starts("validation", 96, horizon)) == validation
  assert len(series.starts("test", 96, horizon)) == test
  assert len(series.starts("train", 96, horizon)) == rows[0] - 96 - horizon + 1


def test_other_files_are_split_70_10_20_and_test_starts_lookback_rows_earlier(tmp_path):
  series = data.load(_write(tmp_path / "some.csv", rows=203))
  assert series.rows == (142, 21, 40)
  train, validation, test = (series.starts(s, 8, 4) for s in data.SPLITS)
  assert (train[0], train[-1] + 8 + 4) == (0, 142)
  assert (validation[0] + 8, validation[-1] + 8 + 4) == (142, 163)
  assert (test[0] + 8, test[-1] + 8 + 4) == (163, 203)
  assert len(test) == 40 - 4 + 1
  assert data.load(tmp_path / "some.csv", rows="100,30,50").rows == (100, 30, 50)


def test_the_scaler_is_that_of_the_train_rows_alone(tmp_path):
  path = _write(
    tmp_path / "some.csv", cell=lambda row, at: (row % 7) * (at + 1) + (row > 150) * 1e6
  )
  series = data.load(path, columns="b")
  train = np.array([(row % 7) * 2.0 for row in range(140)])
  assert series.columns == ("b",)
  np.testing.assert_allclose(series.mean, train.mean())
  np.testing.assert_allclose(series.std, np.sqrt(np.mean((train - train.mean()) ** 2)))
  np.testing.assert_allclose(series.values[:140].mean(0), 0, atol=1e-6)
  np.testing.assert_allclose(series.values[:140].std(0), 1, atol=1e-6)
  assert series.values[199, 0] > 1e5


def test_a_channel_that_never_moves_in_train_is_zero(tmp_path):
  series = data.load(_write(tmp_path / "some.csv", cell=lambda row, at: 3 + at * row))
  assert not series.values[:, 0].any() and np.isfinite(series.values).all()


@pytest.mark.parametrize("minutes, period", [(60, 24), (15, 96), (10, 144), (1440, 1), (7 * 60, 1)])
def test_the_phase_is_the_place_in_the_day(minutes, period, tmp_path):
  series = data.load(_write(tmp_path / "some.csv", minutes=minutes))
  assert series.period == period
  np.testing.assert_array_equal(series.phase, np.arange(200) % period)


def test_a_cycle_of_another_length_is_counted_in_rows(tmp_path):
  path = _write(tmp_path / "some.csv")
  path.write_text("\n".join(["date,a,b", *path.read_text().splitlines()[4:]]) + "\n")
  series = data.load(path)  # begins at 03:00
  np.testing.assert_array_equal(series.places(24), (np.arange(197) + 3) % 24)
  np.testing.assert_array_equal(series.places(168), np.arange(197) % 168)


def test_published_files_come_with_broken_headers_and_line_ends(tmp_path):
  path = tmp_path / "some.csv"
  text = "date,SWDR (W/m\ufffd),OT\r\n" + "".join(
    f"1990/1/{d} 0:00,{d},{d}\r\n" for d in range(1, 31)
  )
  path.write_bytes(text.encode() + b"1990/1/31 0:00,31,1e0\r\n")
  assert data.load(path).columns == ("SWDR (W/m\ufffd)", "OT")
  path.write_bytes(text.encode("utf-8").replace("\ufffd".encode(), b"\xb2"))
  assert len(data.load(path).values) == 30


GOOD = "date,a,b\n" + "".join(f"2016-07-01 {h:02d}:00:00,{h},1\n" for h in range(24))


@pytest.mark.parametrize(
  "text, words",
  [
    ("", "has no rows"),
    ("date,a\n", "has no rows"),
    ("a,b\n1,2\n", "has columns a, b; accepted is date first"),
    ("date\n2016-07-01\n", "accepted is date first and then the channels"),
    (GOOD + "2016-07-02 00:00:00,1\n", "line 26 has 2 cells; its header has 3"),
    (GOOD.replace(",5,", ",,"), "line 7 column 'a' is '', but every value must be a finite"),
    (GOOD.replace(",5,", ",nan,"), "line 7 column 'a' is 'nan'.*1 are not"),
    (GOOD.replace(",5,", ",five,"), "line 7 column 'a' is 'five'"),
    (GOOD.replace(",5,", ",inf,"), "line 7 column 'a' is 'inf'"),
    (GOOD.replace("2016-07-01 00:00:00", "July"), "line 2 has the date 'July'"),
    (GOOD.replace("2016-07-01 09:00:00", "soon"), "line 11 has the date 'soon'"),
    (GOOD.replace("2016-07-01 01:00:00", "2016-06-01 00:00:00"), "accepted are dates that ascend"),
    ("date,a\n2016-07-01 00:00:00,1\n2016-07-01 01:00:00,1\n", "is too short: it has 2 rows"),
  ],
)
def test_bad_files_are_refused_in_one_sentence(text, words, tmp_path):
  path = tmp_path / "some.csv"
  path.write_text(text)
  with pytest.raises(UserError, match=words) as error:
    data.load(path)
  assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_wrong_requests_are_refused_in_one_sentence(tmp_path):
  path = _write(tmp_path / "some.csv")
  with pytest.raises(UserError, match="does not exist"):
    data.load(tmp_path / "none.csv")
  with pytest.raises(UserError, match="has no column 'z'; its columns are a, b"):
    data.load(path, columns="a, z")
  with pytest.raises(UserError, match="accepted are three integers"):
    data.load(path, rows="1,2")
  with pytest.raises(UserError, match=r"too short: it has 200 rows, but .* 100, 50, 51"):
    data.load(path, rows="100,50,51")
  with pytest.raises(UserError, match=r"too short: it has 200 rows, but .* 8640, 2880, 2880"):
    data.load(_write(tmp_path / "ETTh1.csv"))
  series = data.load(path)
  with pytest.raises(
    UserError, match="validation has 20 rows, but lookback=96 and horizon=24 need"
  ):
    series.starts("validation", 96, 24)
  with pytest.raises(UserError, match="train has 140 rows, but lookback=96 and horizon=96 need"):
    series.starts("train", 96, 96)

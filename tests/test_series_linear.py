"""Forecasts without training, and the published linear numbers where the data are at hand."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.series import data, dlinear, linear

SHARED = pathlib.Path(__file__).parent.parent.parent / "shared" / "data" / "ett"


def _series(rows=400, channels=2, seed=0, shift=0.0):
  noise = np.random.default_rng(seed).normal(size=(rows, channels))
  wave = np.sin(np.arange(rows)[:, None] / 3 + np.arange(channels)[None])
  values = (wave + 0.1 * noise + shift * (np.arange(rows) > 300)[:, None]).astype(np.float32)
  parts = (200, 100, 100)
  return data.Series("some", ("a", "b"), values, None, None, None, 1, parts)


def test_repeat_last_is_a_loop_over_the_windows():
  series = _series()
  got = linear.repeat_last(series, "test", 16, 5)
  wrong = [
    series.values[300 + i : 305 + i] - series.values[299 + i][None] for i in range(100 - 5 + 1)
  ]
  assert got.mse == pytest.approx(np.mean(np.square(wrong)), rel=1e-5)
  assert got.mae == pytest.approx(np.mean(np.abs(wrong)), rel=1e-5)


@pytest.mark.parametrize("centred", [False, True])
def test_the_map_is_least_squares_over_all_channels(centred):
  series = _series()
  # Centred windows sum to 0: a ridge of almost nothing picks lstsq's solution, the shortest.
  fitted = linear.fit(series, 16, 5, centred=centred, ridges=(1e-9 if centred else 0.0,))
  level = lambda x: x.mean() if centred else 0.0
  features = lambda x: x - level(x) if centred else np.append(x, 1)
  xs, ys = [], []
  for start in range(200 - 16 - 5 + 1):
    for channel in series.values.T.astype(np.float64):
      x, y = channel[start : start + 16], channel[start + 16 : start + 21]
      xs.append(features(x))
      ys.append(y - level(x))
  want = np.linalg.lstsq(np.array(xs), np.array(ys), rcond=None)[0]
  got = fitted(series.values[None, 250:266])[0]
  for at, x in enumerate(series.values[250:266].T):
    np.testing.assert_allclose(got[:, at], features(x) @ want + level(x), atol=2e-5)


def test_a_ridge_is_chosen_on_validation_and_a_centred_map_follows_a_shift():
  series = _series(shift=5.0)
  fits = [linear.fit(series, 16, 5, ridges=(r,)) for r in linear.RIDGES]
  best = min(fits, key=lambda m: m.errors(series, "validation").mse)
  assert linear.fit(series, 16, 5).ridge == best.ridge
  centred = linear.fit(series, 16, 5, centred=True)
  assert centred.errors(series, "test").mse < best.errors(series, "test").mse
  x = series.values[None, :16]
  np.testing.assert_allclose(centred(x + 7), centred(x) + 7, atol=1e-4)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the ETT files are not beside the repository")
@pytest.mark.parametrize("horizon, mse, mae", [(96, 0.386, 0.400), (336, 0.481, 0.459)])
def test_the_closed_form_is_at_the_published_dlinear_numbers(horizon, mse, mae):
  series = data.load(SHARED / "ETTh1.csv")
  got = linear.fit(series, 96, horizon).errors(series, "test")
  assert got.mse == pytest.approx(mse, rel=0.015)
  assert got.mae == pytest.approx(mae, rel=0.02)
  if horizon == 96:  # the exact least squares, whose absolute error is 1.75% below DLinear's
    assert got == pytest.approx((0.3815, 0.3930), abs=6e-5)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the ETT files are not beside the repository")
def test_dlinear_trained_by_its_authors_recipe_is_at_its_published_numbers():
  series = data.load(SHARED / "ETTh1.csv")
  got = [dlinear.train(series, 96, 96, seed).test for seed in (0, 1, 2)]
  assert np.mean(got, axis=0) == pytest.approx((0.386, 0.400), rel=0.015)


def test_dlinear_is_two_maps_of_a_moving_average_and_the_rest():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 40, 3)).astype(np.float32)
  params = dlinear.init(jax.random.key(1), 40, 5)
  padded = np.pad(x, [(0, 0), (12, 12), (0, 0)], mode="edge")
  trend = np.stack([padded[:, t : t + 25].mean(1) for t in range(40)], axis=1)
  np.testing.assert_allclose(dlinear.trend_of(jnp.asarray(x)), trend, atol=2e-6)
  maps = {name: np.asarray(value) for name, value in params.items()}
  want = np.einsum("bln,lh->bhn", trend, maps["trend"])
  want += np.einsum("bln,lh->bhn", x - trend, maps["rest"]) + maps["bias"].sum(0)[:, None]
  np.testing.assert_allclose(dlinear.forecast(params, jnp.asarray(x)), want, atol=1e-5)
  assert max(np.abs(value).max() for value in maps.values()) <= 40**-0.5


def test_dlinear_approaches_the_closed_form_and_repeats_itself(monkeypatch):
  monkeypatch.setitem(dlinear.RECIPES, "some", dlinear.Recipe(4, 2e-2))
  series = _series(rows=400)
  best = linear.fit(series, 16, 5, ridges=(1e-6,)).errors(series, "validation").mse
  got = dlinear.train(series, 16, 5, 0)
  assert got == dlinear.train(series, 16, 5, 0) != dlinear.train(series, 16, 5, 1)
  assert (
    0.98 * best
    < got.validation.mse
    < 1.2 * best
    < linear.repeat_last(series, "validation", 16, 5).mse
  )
  assert 1 <= got.best_epoch <= got.epochs <= dlinear.EPOCHS
  with pytest.raises(ValueError, match="some has 3 train windows, but a batch of dlinear takes 4"):
    dlinear.train(series, 192, 6, 0)

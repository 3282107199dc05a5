"""The forecaster with every mixer, its normalisation, its training and its command."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_series_data import _write

from experiments import metrics
from experiments.series import linear, main, settings, train
from trellis_jax import mixers
from trellis_jax.forecaster import Forecaster, ForecasterConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

N, L, H = 3, 12, 5
SMALL = dict(num_slots=4, chunk_size=4, state_dim=8)


def _config(mixer="trellis", **kw):
  fields = [f.name for f in dataclasses.fields(mixers.get(mixer).Config)]
  knobs = {mixer: {k: v for k, v in SMALL.items() if k in fields}}
  sizes = dict(width=16, num_layers=1, mlp_width=16, patch=4, stride=4)
  return ForecasterConfig(N, H, L, mixer=mixer, mixers=knobs, **sizes | kw)


def _x(batch=2, seed=0):
  return jax.random.normal(jax.random.key(seed), (batch, L, N))


def _live(forecaster):
  """Gives what starts at 0 a value."""
  forecaster.linear[...] += 0.1 * jax.random.normal(jax.random.key(5), (L, H))
  if forecaster.cfg.num_layers:
    kernel = forecaster.out.kernel
    kernel[...] += 0.1 * jax.random.normal(jax.random.key(6), kernel.shape)
  return forecaster


@pytest.mark.parametrize("mixer", mixers.names())
def test_every_mixer_is_a_backbone(mixer):
  tokens = "patches" if mixer in ("trellis", "attention") else "channels"
  forecaster = _live(Forecaster(_config(mixer, tokens=tokens), rngs=nnx.Rngs(0)))
  graphdef, params = nnx.split(forecaster, nnx.Param)

  @jax.jit
  def run(params, x):
    loss = lambda p: jnp.mean(nnx.merge(graphdef, p)(x) ** 2)
    return nnx.merge(graphdef, params)(x), jax.grad(loss)(params)

  y, grads = run(params, _x())
  assert y.shape == (2, H, N) and bool(jnp.isfinite(y).all())
  mixed = jax.tree.leaves(nnx.to_pure_dict(grads)["blocks"])
  assert all(bool(jnp.isfinite(g).all()) for g in mixed)
  assert sum(bool(jnp.any(g != 0)) for g in mixed) > len(mixed) // 2


def test_a_forecast_is_in_the_windows_own_units():
  cfg = _config(tokens="channels", eps=1e-12)
  forecaster = _live(Forecaster(cfg, rngs=nnx.Rngs(0)))
  scale, shift = jnp.array([[[2.0, 0.5, 3.0]]]), jnp.array([[[7.0, -1.0, 0.0]]])
  want = forecaster(_x()) * scale + shift
  np.testing.assert_allclose(forecaster(_x() * scale + shift), want, atol=1e-4)


def test_an_untrained_forecaster_is_its_linear_path_and_repeats_the_mean():
  forecaster = Forecaster(_config(), rngs=nnx.Rngs(0))
  mean = jnp.broadcast_to(_x().mean(1, keepdims=True), (2, H, N))
  np.testing.assert_allclose(forecaster(_x()), mean, atol=1e-6)
  weights = jax.random.normal(jax.random.key(1), (L, H))
  forecaster.linear[...] = weights
  x = np.asarray(_x())
  want = linear.Linear(np.asarray(weights), np.zeros(H), True, 0.0)(x)
  np.testing.assert_allclose(forecaster(_x()), want, atol=1e-4)


def _by_hand(x, phase, cycle, weights):
  """The forecast without blocks, in numpy."""
  length, horizon = weights.shape
  rows = (np.asarray(phase)[:, None] + np.arange(length + horizon)[None]) % len(cycle)
  mean, deviation = x.mean(1, keepdims=True), np.sqrt(x.var(1, keepdims=True) + 1e-5)
  z = (x - mean) / deviation - cycle[rows[:, :length]]
  y = np.einsum("bln,lh->bhn", z, weights) + cycle[rows[:, length:]]
  return mean + deviation * y


def test_the_cycle_is_read_at_the_rows_of_window_and_forecast():
  forecaster = _live(Forecaster(_config(period=7, num_layers=0), rngs=nnx.Rngs(0)))
  cycle = np.random.default_rng(0).normal(size=(7, N)).astype(np.float32)
  forecaster.cycle[...] = jnp.asarray(cycle)
  phase = np.array([3, 6])
  want = _by_hand(np.asarray(_x()), phase, cycle, np.asarray(forecaster.linear[...]))
  np.testing.assert_allclose(forecaster(_x(), jnp.asarray(phase)), want, atol=1e-5)


@pytest.mark.parametrize(
  "kw, channels_seen", [(dict(tokens="patches", stride=3), 1), (dict(num_layers=2), N)]
)
def test_all_of_the_window_is_seen(kw, channels_seen):
  forecaster = _live(Forecaster(_config("linear_attention", **kw), rngs=nnx.Rngs(0)))
  forecaster.linear[...] = jnp.zeros((L, H))
  grad = nnx.jit(jax.grad(lambda x: jnp.sum(forecaster(x)[0, 0, 0])))(_x())
  assert bool(jnp.all(grad[0, :, :channels_seen] != 0))  # two layers see channels both ways
  assert not bool(jnp.any(grad[0, :, channels_seen:] != 0))


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(tokens="words"), "tokens='words' is unknown; accepted are patches, channels"),
    (dict(tokens="patches", patch=13), "patch=13 is not accepted; it must be <= lookback=12"),
    (dict(period=0), "period=0 is not accepted"),
    (dict(num_layers=-1), "num_layers=-1 is not accepted"),
    (dict(dropout=1.0), r"dropout=1.0 is not accepted; it lies in \[0, 1\)"),
  ],
)
def test_bad_configs_are_refused(change, words):
  with pytest.raises(ValueError, match=words):
    _config(**change)
  with pytest.raises(ValueError, match="mixer='none' is unknown"):
    ForecasterConfig(N, H, L, mixer="none")
  with pytest.raises(ValueError, match=re.escape("x has the shape (2, 11, 3); accepted is")):
    Forecaster(_config(), rngs=nnx.Rngs(0))(_x()[:, 1:])


FLAGS = """
  --config.lookback=12 --config.horizon=5 --config.steps=8 --config.eval.every=4
  --config.batch_size=16 --config.optim.warmup_steps=2 --config.model.width=16
  --config.model.mlp_width=16 --config.model.num_layers=1 --config.model.num_heads=1
  --config.model.mixer=attention
"""
FLAGS = FLAGS.split()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  def cell(row, at):
    return np.sin(row * 2 * np.pi / 24 + at) * (1 + at) + 0.1 * ((row * 7919 + at * 31) % 13)

  return _write(tmp_path_factory.mktemp("series") / "some.csv", rows=400, cell=cell)


def test_the_command_trains_and_appends_its_line(path, tmp_path, capsys):
  results = tmp_path / "some.jsonl"
  argv = ["main", *FLAGS, f"--config.data.path={path}", f"--config.results={results}"]
  assert main.main(argv) == 0
  assert "attention        test mse" in capsys.readouterr().out
  lines = {line["labels"]["model"]: line for line in metrics.read(results)}
  assert set(lines) == {*main.BASELINES, "attention"}
  line = lines["attention"]
  assert line["labels"] == {"dataset": "some", "horizon": 5, "model": "attention"}
  assert line["validation_mse"] <= line["start_validation_mse"]
  assert line["validation_mse"] == pytest.approx(min(mse for _, mse in line["curve"]), abs=1e-4)
  assert "conv_taps" in line["settings"]["model"]["attention"]
  assert "gla" not in line["settings"]["model"] and "--config.horizon=5" in line["command"]
  assert lines["last"]["mse"] > lines["linear"]["mse"]
  assert main.main(argv) == 0
  again = {line["labels"]["model"]: line for line in metrics.read(results)}
  assert len(metrics.read(results)) == 4  # the same run takes the place of its line
  assert again["attention"]["mse"] == line["mse"]
  assert main.main([*argv, "--config.seed=1"]) == 0
  assert len(metrics.read(results)) == 5


def test_the_start_is_closed_form_and_errors_count_every_window_once(path):
  flags = [f"--config.data.path={path}", "--config.model.num_layers=0"]
  cfg = settings.parse(["main", *FLAGS, *flags])
  series = settings.load(cfg)
  model = settings.forecaster(cfg, series)
  assert model.period == 24
  cycle, weights = train.start(series, model)
  program = train._Program.of(model, cfg)
  params = program.init(jax.random.key(0)) | {"linear": jnp.asarray(weights, jnp.float32)}
  params |= {"cycle": jnp.asarray(cycle)}
  values, phase = jnp.asarray(series.values), jnp.asarray(series.phase)

  def errors(split):
    starts = series.starts(split, 12, 5)
    assert len(starts) % program.EVAL_BATCH
    rows = np.stack([series.values[s : s + 17] for s in starts])
    wrong = _by_hand(rows[:, :12], series.phase[starts], cycle, weights) - rows[:, 12:]
    got = program.errors(params, values, phase, starts)
    assert got == pytest.approx((np.mean(wrong**2), np.mean(np.abs(wrong))), rel=1e-4)
    return got

  errors("test")
  # The best cycle leaves nothing of the train windows at a phase, in units of the deviation.
  left, starts = np.zeros((24, 2)), series.starts("train", 12, 5)
  for s in starts:
    rows = series.values[s : s + 17]
    deviation = np.sqrt(rows[:12].var(0) + 1e-5)
    at = series.phase[s : s + 17]
    np.add.at(left, at, deviation * (rows - rows[:12].mean(0) - deviation * cycle[at]))
  np.testing.assert_allclose(left / len(starts), 0, atol=1e-5)
  best = errors("train").mse
  for name in ("linear", "cycle"):
    noise = 0.05 * jax.random.normal(jax.random.key(1), params[name].shape)
    worse = params | {name: params[name] + noise}
    assert program.errors(worse, values, phase, starts).mse > best


def test_training_stops_early_and_keeps_the_best(path):
  flags = ["--config.optim.peak_lr=0.3", "--config.eval.patience=1", "--config.steps=40"]
  flags += ["--config.model.num_layers=0"]
  cfg = settings.parse(["main", *FLAGS, f"--config.data.path={path}", *flags])
  series = settings.load(cfg)
  result = train.run(series, settings.forecaster(cfg, series), cfg)
  assert result.steps < 40 and result.best_step < result.steps
  assert result.validation.mse == min(mse for _, mse in result.curve)


@pytest.mark.parametrize(
  "flags, words",
  [
    ([], "config.data.path is empty, but it must name a CSV file"),
    (["--config.data.path=none.csv"], "series 'none.csv' does not exist"),
    (["--config.loss=mape"], "config.loss = 'mape' is given; accepted are mse, mae, huber"),
    (["--config.model.tokens=words"], "config.model.tokens = 'words' is given; accepted are"),
    (["--config.horizon=0"], "config.horizon = 0 is given, but it must be at least 1"),
    (["--config.optim.warmup_steps=9"], "config.optim.warmup_steps = 9 is given, but it must be"),
    (["PATH", "--config.data.columns=a,z"], "has no column 'z'"),
    (["PATH", "--config.horizon=300"], "train has 280 rows, but lookback=12 and horizon=300"),
    (["PATH", "--config.model.mixer=none"], "mixer='none' is unknown"),
  ],
)
def test_the_command_refuses_in_one_sentence(flags, words, path, capsys):
  flags = [f"--config.data.path={path}" if flag == "PATH" else flag for flag in flags]
  assert main.main(["main", *FLAGS, "--config.results=", *flags]) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and re.search(words, err)

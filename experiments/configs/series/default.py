"""Forecasts of a series: the Trellis forecaster at look-back 96, horizon 96.

    python -m experiments.series.main --config=experiments/configs/series/default.py \\
      --config.data.path=FILE.csv --config.horizon=192
"""

import ml_collections

from experiments.configs import default
from trellis_jax import mixers


def get_config() -> ml_collections.ConfigDict:
  """All fields of a run, with their units."""
  cfg = ml_collections.ConfigDict()
  cfg.seed = 0  # of the initial parameters, of dropout and of the order of the windows
  cfg.results = "runs/series.jsonl"  # where the run's line goes; "" = nowhere
  cfg.lookback = 96  # rows that a forecast sees
  cfg.horizon = 96  # rows that it forecasts
  cfg.steps = 800  # updates at most
  cfg.batch_size = 32  # windows per update
  cfg.loss = "mae"  # "mse", "mae" or "huber"; the best step is that of the least validation MSE

  cfg.data = ml_collections.ConfigDict()
  cfg.data.path = ""  # a CSV: dates, then one column per channel
  cfg.data.rows = ""  # "train,validation,test" rows; "" = what the protocol says of the file's name
  cfg.data.columns = ""  # names of the channels, separated by commas; "" = all

  cfg.model = ml_collections.ConfigDict()
  cfg.model.mixer = "trellis"  # a name, or a pattern over the layers
  cfg.model.tokens = "channels"  # "channels" or "patches"
  cfg.model.patch = 16  # rows of a patch
  cfg.model.stride = 8  # rows between the starts of patches
  cfg.model.period = 0  # rows of the learned cycle; 0 = those of a day, 1 = none
  cfg.model.width = 64  # features
  cfg.model.num_layers = 2  # 0 = the linear path alone
  cfg.model.num_heads = 2
  cfg.model.mlp_width = 128  # features
  cfg.model.dropout = 0.3  # rate before the output map
  base = default.get_config()
  for name in mixers.names():  # each mixer's knobs, documented in trellis_jax/mixers/NAME.py
    cfg.model[name] = base.model[name]
  cfg.model.trellis.num_slots = 16
  cfg.model.trellis.conv_decay = 0.0  # neighbouring channels have no order
  cfg.model.trellis.chunk_size = 7  # channels of the ETT files, a third of those of weather
  cfg.model.trellis.update(default.PLAIN)  # as the lines were run, and so are chunks and read
  cfg.model.trellis.curvature = 0.0
  cfg.model.trellis.phi_out = "ln_silu"

  cfg.optim = base.optim  # the fields of experiments/configs/default.py, without its z_loss
  del cfg.optim.z_loss
  cfg.optim.peak_lr = 1e-3
  cfg.optim.end_lr_ratio = 0.05  # last learning rate / peak

  cfg.eval = ml_collections.ConfigDict()
  cfg.eval.every = 50  # steps between evaluations on the validation split
  cfg.eval.patience = 6  # evaluations without a better one that end the run
  return cfg

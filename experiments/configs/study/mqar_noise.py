"""Recall after noise at equal states: Trellis's stale, linearised and exact chunks, and rivals.

    python -m experiments.study mqar_noise

MQAR with 16 random tokens before the pairs and in all blank places, T = 64, vocabulary 64, 2 layers
of width 64, one head, 1,000 steps of 32 examples. The memories of a layer are 2 n^2 floats: for
Trellis n slots of keys and values n wide, or n / 2 slots of keys and values 2 n wide ("M=n/2"), for
the rivals keys n and values 2 n wide, or the other way round ("keys 2n"). All have short
convolutions of 4 taps: without `conv_decay` those of Trellis's keys start at 2^-j, all others at
the present token alone. "trellis" is the library's default, linearised chunks of 64, here one
chunk; "learned start" has a memory to start from that is learned, at first N(0, 1/4^2), a parameter
and no part of the 2 n^2; "g<1/2" bounds its steps, which start at 1/4 then; "no gate" reads as
linear attention does, without a gate; "plain" has no convolutions of values and codes, values of
length 1 and forget gates from .98, and so have the rows that name their C, which read through
LN-SiLU. What C > 1 keeps beside the memories, those at the start of the chunk, is not counted.
"""

from experiments.configs import default, mqar

SEEDS = (0, 1, 2)
LEARNING_RATES = (3e-3, 6e-3)
COLUMNS = ("pairs", "n")
PAIRS, SIZES = (4, 8, 12), (8, 16, 32)


def models(n: int):
  """Yields (name, mixer, knobs) of memories of 2 n^2 floats."""
  slots = dict(num_slots=n, head_dim=n, value_dim=n, conv_taps=4)
  yield "trellis C=16 stale", "trellis", dict(slots, **mqar.STALE)
  yield "trellis", "trellis", slots
  learned = dict(initial_memory="learned", memory_std=0.25)
  yield "trellis learned start", "trellis", slots | learned
  wide = dict(num_slots=n // 2, head_dim=2 * n, value_dim=2 * n, conv_taps=4)
  yield "trellis M=n/2", "trellis", wide
  short = dict(wide, step_scale=0.5, step_init=0.25)
  yield "trellis M=n/2 g<1/2", "trellis", short
  yield "trellis M=n/2 g<1/2 learned start", "trellis", short | learned
  ungated = short | learned | dict(gate="none")
  yield "trellis M=n/2 g<1/2 learned start no gate", "trellis", ungated
  plain = slots | default.PLAIN
  yield "trellis plain", "trellis", plain
  yield "trellis C=16 linearised", "trellis", dict(plain, chunk_size=16, phi_out="ln_silu")
  yield "trellis C=1", "trellis", dict(plain, chunk_size=1, phi_out="ln_silu")
  rival = dict(head_dim=n, value_dim=2 * n, conv_taps=4)
  yield "gated_delta_net", "gated_delta_net", rival
  yield "gated_delta_net conv_decay=0.5", "gated_delta_net", dict(rival, conv_decay=0.5)
  turned = dict(head_dim=2 * n, value_dim=n, conv_taps=4, conv_decay=0.5)
  yield "gated_delta_net conv_decay=0.5 keys 2n", "gated_delta_net", turned
  yield "linear_attention", "linear_attention", rival
  yield "mamba2", "mamba2", dict(state_dim=n, value_dim=2 * n, conv_taps=4)


def cells():
  """Yields (labels, config) of every setting."""
  for pairs in PAIRS:
    for n in SIZES:
      for name, mixer, knobs in models(n):
        cfg = mqar.get_config()
        cfg.steps, cfg.optim.warmup_steps = 1000, 100
        cfg.data.mqar.update(pairs=pairs, blanks=16, noise=True)
        cfg.model.mixer = mixer
        cfg.model[mixer].update(knobs)
        cfg.log.every, cfg.eval.every, cfg.eval.batches = 10, 250, 16
        yield dict(model=name, pairs=pairs, n=n), cfg

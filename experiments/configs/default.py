"""The default run: a small Trellis language model on the Python standard library's own sources.

    python -m experiments.main --config=experiments/configs/default.py

Any field is set on the command line, `--config.optim.peak_lr=1e-3`. Another run is another file
that changes fields of this one.
"""

import dataclasses

import ml_collections

from trellis_jax import mixers

# Trellis that writes what a token says by itself, values of length 1; gates that forget little.
PLAIN = {"v_conv": False, "v_eps": 1e-6, "alpha_conv": False, "forget_init": 0.98}


def get_config() -> ml_collections.ConfigDict:
  """All fields of a run, with their units."""
  cfg = ml_collections.ConfigDict()
  cfg.seed = 0  # of the initial parameters and of the order of the data
  cfg.workdir = "runs/default"  # checkpoints, metrics, TensorBoard events; the same = go on there
  cfg.steps = 1500  # updates in all
  cfg.batch_size = 1  # sequences per update, over all devices
  cfg.seq_len = 1024  # tokens per sequence
  cfg.grad_accum = 1  # microbatches per update; memory falls with it, the result does not change

  cfg.data = ml_collections.ConfigDict()
  cfg.data.task = ""  # "" = text; a synthetic task of experiments/tasks, such as "mqar"
  cfg.data.path = ""  # "" = the standard library; a folder, files, .jsonl(.gz/.zst) or token files
  cfg.data.text_field = "text"  # of a .jsonl record
  cfg.data.tokenizer = "bpe"  # "bpe" (trained on the corpus), "byte", or a tokenizer.json
  cfg.data.vocab_size = 4096  # tokens of the BPE
  cfg.data.packing = "documents"  # "documents" (state restarts at each) or "concat" (it goes on)
  cfg.data.align = 0  # documents start at multiples of so many tokens; 0 = anywhere
  cfg.data.cache = ".cache/data"  # folder of prepared token files
  cfg.data.mqar = ml_collections.ConfigDict()  # recall of key-value pairs, see tasks/mqar.py
  cfg.data.mqar.vocab_size = 64  # tokens: blank, then keys, from the half on values
  cfg.data.mqar.pairs = 6  # key-value pairs per example, each asked for once
  cfg.data.mqar.blanks = 20  # tokens before the first pair
  cfg.data.mqar.noise = False  # uniform random tokens take the place of all blank ones
  cfg.data.mqar.power = 0.01  # from 0 to 1; the smaller, the sooner the queries; 1 = anywhere
  cfg.data.mqar.train_examples = 100_000  # rows, then they come again in another order
  cfg.data.mqar.held_out_examples = 3_000  # rows of the validation and of the test split
  cfg.data.mqar.seed = 0  # of all examples, whatever the run's seed
  cfg.data.mqar_mix = ml_collections.ConfigDict()  # recall at several lengths, tasks/mqar_mix.py
  cfg.data.mqar_mix.vocab_size = 8192  # tokens
  cfg.data.mqar_mix.settings = "64x4*100000,128x8*20000,256x16*20000,256x32*20000,256x64*20000"
  cfg.data.mqar_mix.blanks = 0  # tokens before the first pair of an example
  cfg.data.mqar_mix.noise = True  # uniform random tokens take the place of all blank ones
  cfg.data.mqar_mix.power = 0.01  # see data.mqar
  cfg.data.mqar_mix.held_out_examples = 1_000  # of each setting, in either held-out split
  cfg.data.mqar_mix.seed = 0  # of all examples, whatever the run's seed
  cfg.data.rebind = ml_collections.ConfigDict()  # overwriting and forgetting, see tasks/rebind.py
  cfg.data.rebind.vocab_size = 64  # tokens: blank, then keys, from the half on values
  cfg.data.rebind.pairs = 6  # keys per example, each asked for once
  cfg.data.rebind.rebound = 3  # of them that are bound a second time; the last binding counts
  cfg.data.rebind.gap = 20  # tokens between the last pair and the first query
  cfg.data.rebind.noise = False  # uniform random tokens take the place of all blank ones
  cfg.data.rebind.train_examples = 100_000  # rows, then they come again in another order
  cfg.data.rebind.held_out_examples = 3_000  # rows of the validation and of the test split
  cfg.data.rebind.seed = 0  # of all examples, whatever the run's seed
  cfg.data.niah = ml_collections.ConfigDict()  # needles in haystacks, see tasks/niah.py
  cfg.data.niah.kinds = "niah_single_1"  # names, separated by commas; samples take turns
  cfg.data.niah.haystack = ""  # a text for kinds 2 and 3: a folder, files, as data.path
  cfg.data.niah.words = ""  # a folder with adjectivelist.txt and nounlist.txt; "" = our own
  cfg.data.niah.tokenizer = "byte"  # or "bpe-N", of N tokens, or a tokenizer.json
  cfg.data.niah.min_length = 512  # tokens of the shortest samples; the longest fill a row
  cfg.data.niah.answer_only = True  # whether the answers' tokens alone count in the loss
  cfg.data.niah.grow_examples = 0  # rows over which the longest samples grow; 0 = none
  cfg.data.niah.train_examples = 100_000  # rows, then they come again in another order
  cfg.data.niah.held_out_examples = 500  # rows of the validation and of the test split
  cfg.data.niah.seed = 0  # of all examples, whatever the run's seed

  cfg.model = ml_collections.ConfigDict()
  cfg.model.mixer = "trellis"  # a name, or a pattern over the layers: "trellis,trellis,attention"
  cfg.model.width = 256  # features
  cfg.model.num_layers = 5
  cfg.model.num_heads = 2  # must divide the width
  cfg.model.mlp_width = 0  # features; 0 = 8/3 of the width, rounded up to a multiple of 64
  cfg.model.tie_embeddings = True  # the head is the transposed embedding
  cfg.model.norm_eps = 1e-6  # of the RMSNorms
  cfg.model.init_std = 0.0  # of the matrices' initial values; 0 = inputs^-1/2 of each
  cfg.model.embed_std = 0.0  # of the embedding; 0 = 0.02 when tied, 1 when not
  cfg.model.remat = "none"  # what the backward pass recomputes: "none", "full", "dots"
  cfg.model.scan_layers = True  # False: layers compiled one after the other, for fewer copies
  cfg.model.dtype = "float32"  # of the computation, "bfloat16" on accelerators; parameters are fp32
  for name in mixers.names():  # each mixer's knobs, documented in trellis_jax/mixers/NAME.py
    cfg.model[name] = ml_collections.ConfigDict(dataclasses.asdict(mixers.get(name).Config()))

  cfg.optim = ml_collections.ConfigDict()
  cfg.optim.peak_lr = 3e-3
  cfg.optim.end_lr_ratio = 0.01  # last learning rate / peak
  cfg.optim.schedule = "cosine"  # after the warm-up: "cosine", "linear", "wsd" (stay, then decay)
  cfg.optim.warmup_steps = 50  # updates
  cfg.optim.decay_steps = 200  # updates of wsd's decay; the other schedules decay all along
  cfg.optim.b1 = 0.9
  cfg.optim.b2 = 0.95
  cfg.optim.eps = 1e-8
  cfg.optim.weight_decay = 0.1  # per unit of learning rate, on matrices only
  cfg.optim.clip = 1.0  # global gradient norm; 0 = no clipping
  cfg.optim.z_loss = 0.0  # weight of logsumexp^2 in the objective; 1e-4 steadies large models

  cfg.mesh = ml_collections.ConfigDict()  # devices per axis, -1 = those that the others leave
  cfg.mesh.data = -1  # divides the batch
  cfg.mesh.fsdp = 1  # divides the batch, the parameters and the optimiser's state
  cfg.mesh.model = 1  # divides heads and features

  cfg.distributed = ml_collections.ConfigDict()  # several processes; JAX finds "" and -1 on a
  cfg.distributed.enabled = False  # cluster that it knows
  cfg.distributed.coordinator = ""  # host:port of process 0
  cfg.distributed.num_processes = -1
  cfg.distributed.process_id = -1

  cfg.checkpoint = ml_collections.ConfigDict()
  cfg.checkpoint.every = 150  # steps; the last step is always saved
  cfg.checkpoint.keep = 2  # newest checkpoints kept

  cfg.eval = ml_collections.ConfigDict()
  cfg.eval.every = 150  # steps, and after the last one; 0 = never
  cfg.eval.batches = 32  # batches of the validation split, the same ones each time

  cfg.log = ml_collections.ConfigDict()
  cfg.log.every = 10  # steps per line of metrics.jsonl
  cfg.log.tensorboard = True  # events in workdir/tensorboard
  cfg.log.wandb = ""  # Weights & Biases project; "" = none

  cfg.profile = ml_collections.ConfigDict()
  cfg.profile.start = -1  # first step of a jax.profiler trace in workdir/profile; -1 = none
  cfg.profile.steps = 3
  return cfg

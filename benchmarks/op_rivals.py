"""The ops that `benchmarks/op.py` is compared to, where PyTorch and a CUDA device are there.

Gated DeltaNet and gated slot attention of flash-linear-attention, and PyTorch's flash attention:
heads, widths, slots, dtype and lengths are those of the op, inputs are random. Each is timed in a
process of its own and has so many seconds for it: some of these kernels try many settings before
their first call, which can take minutes. A package that is missing, or a process that fails or
takes too long, is a line in the table's foot.

    python -m benchmarks.op_rivals chunk_gsa '{"B": 8, "T": 2048, "H": 12, ...}' 20
"""

import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

LIMIT = 150  # seconds of a rival at a shape


def times(name: str, shape: dict, rounds: int, limit: float) -> tuple[dict | None, str]:
  """Returns (what `seconds` says of a rival, or None; a sentence where there is something to say).

  In another process, so that it can be stopped.
  """
  command = [sys.executable, "-m", __name__, name, json.dumps(shape), str(rounds)]
  where = f"{name} at B {shape['B']}, T {shape['T']}"
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
  except subprocess.TimeoutExpired:
    return None, f"{where} had no time after {limit:g} s"
  if done.returncode:
    why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return None, f"{where} failed: {why[:200]}"
  said = json.loads(done.stdout.splitlines()[-1])
  return said["times"], said["note"]


def available() -> tuple[dict[str, Callable], list[str]]:
  """Returns ({name: make(shape) -> (call, inputs)}, a sentence for each that is not there)."""
  found, missing = {}, []
  torch = _import("torch")
  if torch is None or not torch.cuda.is_available():
    why = "torch is not installed" if torch is None else "torch sees no CUDA device"
    return {}, [f"no rivals: {why}"]
  for name, module, make in (
    ("chunk_gated_delta_rule", "fla.ops.gated_delta_rule", _delta_rule),
    ("chunk_gsa", "fla.ops.gsa", _slot_attention),
  ):
    ops = _import(module)
    if ops is None:
      missing.append(f"no {name}: flash-linear-attention or triton is not installed")
    else:
      found[name] = lambda shape, ops=ops, make=make: make(torch, ops, shape)
  found["flash attention"] = lambda shape: _attention(torch, shape)
  return found, missing


def _lift_refusal() -> str:
  """Lets flash-linear-attention time its delta rule's backward where Triton compiles it wrongly.

  On Hopper it refuses Triton 3.4 to 3.7.0 for that kernel without TileLang (its issue 640). The
  results are not used here.
  """
  chunk_o = _import("fla.ops.common.chunk_o")
  if getattr(chunk_o, "TRITON_ABOVE_3_7_1", True) or _import("tilelang"):
    return ""
  chunk_o.TRITON_ABOVE_3_7_1 = True
  return (
    "flash-linear-attention holds the backward of chunk_gated_delta_rule to be wrong with this "
    "Triton on Hopper; it is timed all the same"
  )


def _import(name: str):
  try:
    return importlib.import_module(name)
  except ImportError:
    return None


def _inputs(torch, shape, *widths):
  b, t, h = shape["B"], shape["T"], shape["H"]
  draw = lambda width: torch.randn(b, t, h, width, device="cuda", dtype=torch.bfloat16)
  unit = lambda x: torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype)
  return [unit(draw(width)).requires_grad_() for width in widths]


def _gates(torch, shape, *more):
  size = (shape["B"], shape["T"], shape["H"], *more)
  draw = lambda: torch.randn(*size, device="cuda")
  return torch.nn.functional.logsigmoid(draw() + 4).requires_grad_(), torch.sigmoid(draw())


def _delta_rule(torch, ops, shape):
  q, k, v = _inputs(torch, shape, shape["D"], shape["D"], shape["V"])
  g, beta = _gates(torch, shape)
  beta.requires_grad_()
  return (lambda: ops.chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0]), (q, k, v, g, beta)


def _slot_attention(torch, ops, shape):
  q, k, v = _inputs(torch, shape, shape["D"], shape["D"], shape["V"])
  g, _ = _gates(torch, shape, shape["M"])
  s = (1 - g.detach().exp()).to(torch.bfloat16).requires_grad_()
  return (lambda: ops.chunk_gsa(q, k, v, s=s, g=g)[0]), (q, k, v, s, g)


def _attention(torch, shape):
  q, k, v = _inputs(torch, shape, shape["D"], shape["D"], shape["V"])
  heads = lambda x: x.transpose(1, 2)
  backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
  attend = torch.nn.functional.scaled_dot_product_attention

  def call():
    with torch.nn.attention.sdpa_kernel(backend):
      return heads(attend(heads(q), heads(k), heads(v), is_causal=True))

  return call, (q, k, v)


def seconds(make: Callable, shape: dict, rounds: int) -> dict[str, float]:
  """Returns the seconds of the forward and of both, as `op.lines` names them.

  Blocked are medians on fresh random inputs; a device's are those of its kernels, summed.
  """
  import torch

  def once(backward: bool) -> Callable:
    call, inputs = make(shape)

    def run():
      if backward:
        torch.autograd.grad(call().float().square().sum(), inputs)
      else:
        with torch.no_grad():
          call()

    return run

  def blocked(backward: bool) -> float:
    times = []
    for i in range(rounds + 3):
      run = once(backward)
      torch.cuda.synchronize()
      start = time.perf_counter()
      run()
      torch.cuda.synchronize()
      if i >= 3:  # the first ones compile and tune
        times.append(time.perf_counter() - start)
    return statistics.median(times)

  def device(backward: bool, times: int = 5) -> float:
    run = once(backward)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
      for _ in range(times):
        run()
      torch.cuda.synchronize()
    return sum(e.self_device_time_total for e in profile.key_averages()) / times / 1e6

  found = {}
  for side, backward in (("forward", False), ("both", True)):
    found[f"{side}_seconds"] = blocked(backward)
    found[f"{side}_device_seconds"] = device(backward)
  return found


def main(argv: list[str]) -> None:
  """Prints the times of one rival at one shape, as JSON."""
  name, shape, rounds = argv[1], json.loads(argv[2]), int(argv[3])
  note = _lift_refusal() if name == "chunk_gated_delta_rule" else ""
  print(json.dumps({"times": seconds(available()[0][name], shape, rounds), "note": note}))


if __name__ == "__main__":
  main(sys.argv)

"""How many tokens a loop over blocks takes at a time; results do not depend on it."""

import pallas_kernels

# On a CPU what stays in a core's cache; elsewhere a step of a loop is a dozen launches, which a
# block has to be worth.
CPU, ELSEWHERE = 128, 2048


def block_tokens() -> int:
  """Returns the tokens of a block where a call would run."""
  return CPU if pallas_kernels.platform() == "cpu" else ELSEWHERE

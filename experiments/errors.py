"""The error that a command shows as one sentence."""


class UserError(ValueError):
  """A mistake of the caller that one sentence explains; commands print it and exit with 2."""


def at_least(least: int, section: str, knobs: object, *names: str) -> None:
  """Raises UserError for the first of a section's knobs that is below `least`."""
  for name in names:
    if getattr(knobs, name) < least:
      raise UserError(f"{section}.{name}={getattr(knobs, name)}; accepted is at least {least}")

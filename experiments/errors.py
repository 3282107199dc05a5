"""The error that a command shows as one sentence."""


class UserError(ValueError):
  """A mistake of the caller that one sentence explains; commands print it and exit with 2."""

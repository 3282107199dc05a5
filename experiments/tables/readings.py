"""The literal reading of the paper, and each of its choices alone."""

import pathlib

from experiments.tables import language, page


def build(results: pathlib.Path) -> page.Page:
  """The page of the readings."""
  lines = language.read(results, "readings")
  return language.build("readings", "The literal reading, choice by choice", lines)

"""The literal reading of the paper, each of its choices alone, and others."""

import pathlib

from experiments.tables import language, page


def build(results: pathlib.Path) -> page.Page:
  """The page of the readings."""
  lines = language.read(results, "readings")
  return language.build("readings", "Readings, choice by choice", lines)

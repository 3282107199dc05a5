"""README and docs/method.md say nothing in numbers that no page of results says."""

import re

from experiments.provenance import ROOT

NUMBER = re.compile(r"\d+\.\d+")


def test_numbers_of_the_documents_stand_in_a_page_of_results():
  folders = (ROOT / "docs" / "results", ROOT / "benchmarks" / "results")
  pages = [page for folder in folders for page in folder.rglob("*.md")]
  known = {n for p in pages for n in NUMBER.findall(p.read_text())}
  readme = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
  readme = re.sub(r"Python >= 3\.11|arXiv 2512\.23852", "", readme)
  method = (ROOT / "docs" / "method.md").read_text()
  tried = method.split("\n## What has been tried\n")[1].split("\n## Tried by hand\n")[0]
  for text in (readme, tried):
    assert NUMBER.findall(text)
    assert not [n for n in NUMBER.findall(text) if n not in known]

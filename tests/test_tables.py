"""The result pages: made from lines alone, the committed ones byte for byte, bad lines refused."""

import json
import math
import pathlib
import re

import matplotlib as mpl
import numpy as np
import pytest

from experiments import provenance
from experiments.configs import default as default_config
from experiments.configs.paper import base, matched
from experiments.configs.study import mqar_noise
from experiments.evals import perplexity
from experiments.tables import __main__ as tables
from experiments.tables import figures, language, page, run, solutions
from experiments.tables import lines as lines_lib

DOCS = provenance.ROOT / "docs" / "results"


def line(row, scale, loss, *, seed=0, rate=None, **more):
  """A line as the runner writes them, with a perplexity that nobody has measured."""
  parts = [
    {"first": first, "last": last, "tokens": 5, "perplexity": loss + 0.01 * first}
    for first, last in perplexity.ranges(row.labels.get("context", 2048))
  ]
  scores = {"nats": loss, "tokens": 1, "perplexity": loss, "bits_per_byte": loss / 10}
  scores["by_position"] = parts
  about = {"tokens": row.tokens, "parameters": 1000, "state_floats": 10, "flops": row.tokens * 1e6}
  about |= {"corpus": "books", "corpus_digest": "d", "revision": "abc", "command": "python -m x"}
  found = {"labels": row.labels, "scale": scale, "seed": seed, "peak_lr": rate or row.rates[1]}
  found |= {"failure": "", "validation": scores, "test": scores, "seconds": 1.0}
  return found | about | more


def save(path, lines):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(x) + "\n" for x in lines))


def rows_of(name, scale="mini"):
  return {tuple(row.labels.values()): row for row in run.get(name).rows(scale)}


def text_of(name, results):
  return tables.build(name, results).text


def cells(text, start):
  """The cells of the table row that begins with `start`, the last such row of the text."""
  row = [x for x in text.splitlines() if x.startswith(f"| {start} ")][-1]
  return [cell.strip() for cell in row.strip("|").split("|")]


def _committed(path):
  return [json.loads(x) for x in path.read_text().splitlines()]


@pytest.mark.parametrize(
  "path", sorted((tables.RESULTS / "study").glob("*.jsonl")), ids=lambda p: p.stem
)
def test_a_study_s_lines_are_of_the_settings_that_it_has_now(path):
  now = {str(labels): run.study.settings(cfg) for labels, cfg in run.study.get(path.stem).cells()}
  for line in _committed(path):
    assert line["settings"] == now[str(line["labels"])], line["labels"]


@pytest.mark.parametrize(
  "path", sorted((tables.RESULTS / "lm").glob("*.jsonl")), ids=lambda p: p.stem
)
def test_a_table_s_lines_are_of_the_settings_that_its_rows_have_now(path):
  rows = {scale: rows_of(path.stem, scale) for scale in base.SCALES}
  for line in _committed(path):
    row = rows[line["scale"]][tuple(line["labels"].values())]
    cfg = row.config.copy_and_resolve_references()
    cfg.steps = line["tokens"] // (cfg.batch_size * cfg.seq_len)
    cfg.optim.warmup_steps = cfg.steps // 10
    assert line["settings"] == run.settings(cfg), line["labels"]


def test_the_committed_pages_are_those_that_the_committed_lines_give(tmp_path):
  tables.write(tables.RESULTS, tmp_path)
  made = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  there = {p.name: p.read_bytes() for p in DOCS.iterdir()}
  assert not set(made) ^ set(there), "`make tables`, and commit docs/results with these alone"
  same_pixels = f"matplotlib {mpl.__version__};" in (DOCS / "README.md").read_text()
  for name in made:
    if name == "README.md" and not same_pixels:
      continue
    if not name.endswith(".png") or same_pixels:
      assert made[name] == there[name], f"{name}: `make tables` and commit docs/results"


def test_without_lines_no_page_has_a_number_of_ours(tmp_path):
  tables.write(tmp_path / "none", tmp_path / "out")
  for name in tables.TABLES:
    text = (tmp_path / "out" / f"{name}.md").read_text()
    if name == "series":
      assert "not run" in text and not re.search(r"^\| trellis .*\d\.\d", text, re.MULTILINE)
      continue
    if name != "mqar":
      assert text.count(": not run.") == len(base.SCALES)
    assert "perplexity |" not in text
  assert "| not run" in (tmp_path / "out" / "README.md").read_text()


def test_table_4_shows_the_best_rate_the_spread_and_who_is_ahead(tmp_path):
  rows, lines = rows_of("table4"), []
  for context, gap in ((512, 0.5), (8192, 0.25)):
    mine, theirs = rows["trellis", context], rows["gated_delta_net", context]
    lines += [line(mine, "mini", loss, rate=rate) for rate, loss in zip(mine.rates, (9, 5, 7))]
    lines += [line(mine, "mini", 5.5, seed=1), line(theirs, "mini", 5.25 + gap)]
  lines.append(line(rows["mamba2", 512], "mini", 0, failure="train/loss is nan at step 3"))
  save(tmp_path / "lm" / "table4.jsonl", lines)
  built = tables.build("table4", tmp_path)
  grid = built.text.split("## mini")[1].split("|-")[0] + built.text.split("## mini")[1]
  row = next(x for x in grid.splitlines() if x.startswith("| Trellis  "))
  assert [c.strip() for c in row.strip("|").split("|")][1:] == [
    "5.25 (5.00-5.50)", "not run", "not run", "not run", "5.25 (5.00-5.50)"
  ]  # fmt: skip
  assert re.search(r"\| Mamba2 +\| not finite", built.text)
  assert "T = 512: Trellis 5.00 is below Gated DeltaNet 5.75, gap +0.75 (the paper" in built.text
  shrinks = "The gap of Trellis to Gated DeltaNet SHRINKS from T = 512 (+0.75) to 8192 (+0.50)."
  assert shrinks in built.text
  assert cells(built.text, "Trellis 512")[1:7] == [
    "19.09", "5.25 (5.00-5.50)", "0.525 (0.500-0.550)", "0.0125 of 0.005 0.0125 0.0312", "0 1",
    f"{2**20:,}",
  ]  # fmt: skip
  assert built.status == "5 of 60 rows at mini" and set(built.figures) == {"table4"}
  # Another number of tokens is a table of its own.
  save(tmp_path / "lm" / "table4.jsonl", [*lines, line(rows["trellis", 512], "mini", 3, tokens=64)])
  text = text_of("table4", tmp_path)
  assert "## mini: 64 tokens of books" in text and "5.25 (5.00-5.50)" in text


def test_choices_stand_beside_gated_delta_net_and_the_default_of_table_4(tmp_path):
  theirs, mine = rows_of("table4"), rows_of("matched")
  lines = [line(theirs["gated_delta_net", 512], "mini", x, seed=s) for s, x in ((0, 4), (1, 9))]
  lines += [line(theirs["trellis_wide", 512], "mini", 6 * math.e)]
  lines += [line(theirs["gated_delta_net", 2048], "mini", 0, failure="loss is nan at step 3")]
  # A rate that the choices have not run with says nothing here, however good it is.
  lines += [line(theirs["trellis_wide", 512], "mini", 1, rate=0.0312)]
  save(tmp_path / "lm" / "table4.jsonl", lines)
  rows = [mine["plain", 512], mine["conv+eps", 512], mine["plain", 2048]]
  losses = (6 * math.e**0.25, 6 / math.e**0.5, 7)
  save(tmp_path / "lm" / "matched.jsonl", [line(r, "mini", x) for r, x in zip(rows, losses)])
  built = tables.build("matched", tmp_path)
  said = [x for x in built.text.splitlines() if x.startswith("* ")]
  assert said == [
    "* T = 512: Gated DeltaNet has 6.50 (4.00-9.00), 2 seeds ([Table 4](table4.md)), all at "
    "0.0125. Nats a token more than it, means over seeds: conv+eps -0.500, plain +0.250, the "
    "library's default +1.000."
  ]
  names = [x.get_text() for x in built.figures["matched"].axes[0].get_yticklabels()]
  assert names == ["conv+eps", "plain", "the library's default", "Gated DeltaNet"]


def test_models_of_one_colour_are_told_apart_and_alike_in_all_panels():
  at = [figures.Point.of(x, [1.0, 2.0]) for x in (1, 2)]
  kinds = ("trellis", "trellis plain", *(f"trellis {i}" for i in range(8)))
  panels = [("one", {"gsa": at, kinds[1]: at}), ("two", {k: at for k in kinds})]
  one, two = figures.lines(panels, "title", "x").axes
  style = lambda bar: (bar[0].get_color(), bar[0].get_linestyle(), bar[0].get_marker())
  styles = lambda ax: {bar.get_label(): style(bar) for bar in ax.containers}
  names = [language.NAMES.get(k, k) for k in kinds]
  shown = [styles(two)[name] for name in names]
  assert len({s[0] for s in shown}) == 1 and len({s[1:] for s in shown}) == 10
  assert styles(one)[names[1]] == styles(two)[names[1]]


def test_a_row_that_is_far_behind_leaves_the_others_their_room():
  values = {"trellis": [10.0, 11.0], "near": [15.0], "far": [98.545]}
  points = {name: figures.Point.of(0, of) for name, of in values.items()}
  (ax,) = figures.dots([("one", points)], "title", "x").axes
  assert [text.get_text().strip() for text in ax.texts] == ["98.55"]
  assert 15 <= ax.get_xlim()[1] < 16


def test_a_point_that_is_far_behind_leaves_the_lines_their_room():
  at = lambda *values: [figures.Point.of(512 * 2**i, [v]) for i, v in enumerate(values)]
  models = {"trellis": at(10.0, 11.0), "delta_net": at(19.0, 21.0), "attention": at(90.0)}
  models["mamba2"] = []  # was not run
  (ax,) = figures.lines([("one", models)], "title", "x").axes
  assert [text.get_text() for text in ax.texts] == ["21.0", "90.0"]
  assert 19 <= ax.get_ylim()[1] < 20
  shown = figures.lines([("one", models)], "title", "x", "accuracy").axes[0]
  assert not shown.texts and shown.get_ylim()[1] > 90


def test_a_choice_sets_what_its_words_say():
  rows = rows_of("matched")
  knobs = lambda name: rows[name, 512].config.model.trellis.to_dict()
  default = rows_of("table4")["trellis_wide", 512].config.model.trellis.to_dict()
  words = matched.WORDS
  assert knobs("plain") == default | default_config.PLAIN
  assert knobs("conv+eps") == knobs("plain") | words["conv"] | words["eps"]
  assert default == knobs("conv+eps+codes") | words["f95"]  # as its docstring says
  assert set("+".join(matched.CHOICES).split("+")) == {"plain", *words}


def test_ablations_say_what_they_cost_over_the_seeds_they_share_and_chunks_what_they_lose(tmp_path):
  rows = rows_of("table2")
  losses = {"trellis": 5, "no_forget": 5.5, "f_softmax": 4.75, "exact": 4.5, "stale_64": 6}
  lines = [line(rows[(n,)], "mini", x) for n, x in losses.items()]
  lines += [
    line(rows[("trellis",)], "mini", 7, seed=1),
    line(rows[("no_forget",)], "mini", 7.25, seed=1),
  ]
  save(tmp_path / "lm" / "table2.jsonl", lines)
  text = text_of("table2", tmp_path)
  cost = "no_forget costs perplexity: +0.38 (+0.50, +0.25 by seed) (the paper: +0.41), 2 seeds."
  assert f"* {cost}" in text
  assert "* f_softmax does NOT cost perplexity: -0.25 (the paper: +0.42), one seed." in text
  assert "* linear_phi_f_ln_silu: not run." in text
  # log 5 / log 4.5, log 6 / log 4.5.
  assert "* trellis: 1.609 nats, +7.0% of the 1.504 of C = 1, one seed." in text
  assert "* stale_64: 1.792 nats, +19.1% of the 1.504 of C = 1, one seed." in text
  assert "stale_16:" not in text


@pytest.mark.parametrize("name", ["fig2", "fig3", "readings"])
def test_points_that_ran_are_shown_beside_the_papers(name, tmp_path):
  rows = list(rows_of(name).values())
  save(tmp_path / "lm" / f"{name}.jsonl", [line(row, "mini", 5) for row in rows[:3]])
  built = tables.build(name, tmp_path)
  assert built.status == f"3 of {len(rows)} rows at mini"
  built.write(tmp_path)
  assert all((tmp_path / f"{figure}.png").stat().st_size > 10_000 for figure in built.figures)
  assert "not run" in built.text and "5.00" in (tmp_path / f"{name}.tex").read_text()


def test_scored_tables_show_every_task(tmp_path):
  rows = rows_of("table3")
  names = [f"{kind} {n}" for kind, n in run.table3.CELLS]
  one = line(rows[("trellis",)], "mini", 5, scores=dict(zip(names, range(9))))
  save(tmp_path / "lm" / "table3.jsonl", [one])
  text = text_of("table3", tmp_path)
  ours = text.split("| scores")[1]
  assert re.search(r"\| Trellis +\| 0.00 .*\| 8.00 .*\| 4.00 ", ours)
  assert re.search(r"\| Trellis, M = 32, wide \| not run", ours)
  assert "79.78" in text.split("Scale paper")[0]  # the mean of the paper's nine


def test_a_study_with_traces_shows_how_its_models_learn(tmp_path):
  names = run.study.get("conv_start").TRACES
  lines = [
    {
      "labels": {"model": "trellis C=16 stale", "conv_decay": decay},
      "seed": seed,
      "peak_lr": 1.5e-3,
      "accuracy": 0.5,
      "onset": 10,
      "floats_of_state": 7,
      "revision": "abc",
      "eval_steps": [50, 100],
      "eval_accuracy": [0.1, decay],
      "traces": {
        name: [[9, seed], [-1, decay]] for name in names
      },  # by layer: the second ends high
    }
    for decay in (0.0, 0.5)
    for seed in (0, 1)
  ]
  save(tmp_path / "study" / "conv_start.jsonl", lines)
  built = tables.build("mqar", tmp_path)
  axes = built.figures["conv_start"].axes
  assert len(axes) == 1 + len(names)
  shown = lambda ax: [list(line.get_ydata()) for line in ax.lines]
  assert shown(axes[0]) == [[0.1, 0.0], [0.1, 0.0], [0.1, 0.5], [0.1, 0.5]]
  assert shown(axes[2]) == [[0, 0.0], [1, 0.0], [0, 0.5], [1, 0.5]]


def test_where_runs_ended_is_shown_of_all_that_are_not_stale(tmp_path):
  cells = {tuple(labels.values()): (labels, cfg) for labels, cfg in mqar_noise.cells()}
  lines = []
  for i, model in enumerate(("trellis C=16 stale", "trellis", "trellis C=1", "mamba2")):
    labels, cfg = cells[model, 4, 8]
    traces = {"step_size": [[9, 9], [8, i / 2]], "rank_key": [[9, 9], [9, i]]}
    traces |= {"binding": [[9, i]], "higher_order": [[9, i]]}
    settings = json.loads(cfg.to_json_best_effort())
    of_trellis = model.startswith("trellis")
    lines.append(
      {"labels": labels, "settings": settings, "accuracy": i / 8, "traces": of_trellis and traces}
    )
  figure = solutions.scatter("x", lines, [line["labels"] for line in lines])
  panel, colours = figure.axes[0], figure.axes[1]
  dots = panel.collections[0]
  np.testing.assert_allclose(dots.get_offsets(), [[0.5, 0.125], [1, 0.25]])
  np.testing.assert_allclose(dots.get_array(), [1 / 8, 2 / 8])  # keys are 8 wide
  assert panel.get_title() == "n 8" and "rank" in colours.get_ylabel()
  assert solutions.scatter("x", lines[-1:], [lines[-1]["labels"]]) is None
  text = solutions.table([*lines, lines[1] | {"accuracy": 1.0}], [line["labels"] for line in lines])
  small, large = ([x.strip() for x in row.split("|")[1:-1]] for row in text.splitlines()[2:])
  assert small[:5] == ["8", "4", "2", "0.50 to 0.50", "0.12 to 1.00"]
  assert large[2:] == ["1", "1.00 to 1.00", *["0.25 to 0.25"] * 2, *["2.00 to 2.00"] * 2]


def test_recall_has_a_curve_for_every_study_over_pairs(tmp_path):
  lines = [
    {
      "labels": {"model": model, "pairs": 4, "n": n},
      "seed": seed,
      "peak_lr": rate,
      "accuracy": 0.5 * seed + 10 * rate,
      "onset": 10,
      "floats_of_state": 7,
      "revision": "abc",
      "lost": None,
      "steps": [10, 20, 30],
      "train_accuracy": [0.0, rate, 0.5 * seed],
    }
    for model in ("trellis C=16 stale", "gated_delta_net")
    for n in (8, 16)
    for seed in (0, 1)
    for rate in (2e-3, 4e-3)
  ]
  save(tmp_path / "study" / "mqar_noise.jsonl", lines)
  built = tables.build("mqar", tmp_path)
  assert "0.29 (0.04-0.54) 10" in built.text and ".." in built.text
  assert built.status == "mqar_noise: 4 of 135 settings"
  assert set(built.figures) == {"mqar_noise", "mqar_noise_steps"}
  panels = built.figures["mqar_noise_steps"].axes
  assert [ax.get_title() for ax in panels] == ["4 pairs, n 8", "4 pairs, n 16"]
  for line in panels[1].lines:  # the better rate; of batches side by side and of two seeds
    np.testing.assert_allclose(line.get_ydata(), [2e-3, (4e-3 + 0.25) / 3, (4e-3 + 0.25) / 2])
  (ax,) = built.figures["mqar_noise"].axes
  assert [list(c.lines[0].get_xdata()) for c in ax.containers] == [[8, 16], [8, 16]]
  with (tmp_path / "study" / "mqar_noise.jsonl").open("a") as f:
    f.write('{"labels"')
  with pytest.raises(ValueError, match=r"mqar_noise\.jsonl:17 is cut off or no JSON"):
    tables.build("mqar", tmp_path)


def test_a_lines_file_that_is_bad_is_one_sentence(tmp_path, capsys):
  row = rows_of("table4")["trellis", 512]
  good = json.dumps(line(row, "mini", 5))
  bad = {
    good[:-9]: "table4.jsonl:1 is cut off or no JSON",
    good + "\n{}\n": "table4.jsonl:2 has no field 'labels'",
    json.dumps(line(row, "mini", 5) | {"labels": {"model": "x"}}): "of no row at mini",
  }
  for text, words in bad.items():
    (tmp_path / "lm").mkdir(exist_ok=True)
    (tmp_path / "lm" / "table4.jsonl").write_text(text)
    argv = ["tables", "table4", f"--results={tmp_path}", f"--out={tmp_path / 'out'}"]
    assert tables.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err
    assert not (tmp_path / "out").exists()
  assert tables.main(["tables", "table9"]) == 2
  assert "table 'table9' is unknown; accepted are table1, table2" in capsys.readouterr().err


def test_latex_has_the_tables_of_the_markdown():
  text = "# A_1\n\n" + page.table([["x_y", "50%"], ["z", ""]], ["a", "b"]) + "\n\n# B\n\nnone\n"
  assert page.latex(text).splitlines()[1:] == [
    r"\begin{table}",
    r"\caption{A\_1}",
    r"\begin{tabular}{lr}",
    r"\toprule",
    r"a & b \\",
    r"\midrule",
    r"x\_y & 50\% \\",
    r"z &  \\",
    r"\bottomrule",
    r"\end{tabular}",
    r"\end{table}",
  ]


def test_every_table_of_the_folder_is_written():
  own = {
    "__init__",
    "__main__",
    "figures",
    "language",
    "learning",
    "lines",
    "page",
    "run",
    "scored",
    "solutions",
    "together",
  }
  files = {p.stem for p in pathlib.Path(language.__file__).parent.glob("*.py")}
  assert files - own == set(tables.TABLES)
  assert lines_lib.read(pathlib.Path("none.jsonl")) == []

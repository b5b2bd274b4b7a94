"""The report as HTML: self-contained, escaped, bounded, and what it says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd

import crlseq
from crlseq.report import write_report
from crlseq.report.charts import _ticks, effects, intervention_map, losses
from crlseq.run.advice import limitations, what_next
from crlseq.run.findings import findings
from crlseq.run.run import Run
from crlseq.run.summary import answers
from tests.support import check_refusal, files_below, invoke, succeeds
from tests.synthetic import found_by_bootstrap, synthetic_run, with_info, with_pairs

# From pandas 3 on no text in a table can hold half of a pair.
SURROGATE = "\ud800" if int(pd.__version__.split(".")[0]) < 3 else ""
EVIL = ["<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "\" onmouseover=\"alert(3)", "'`{{ 7*7 }}", SURROGATE + "\x00"]  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, ids, links, and the text by the id of its section."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr", "path", "rect", "circle", "polyline"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str | None]] = []
        self.text: dict[str, str] = {}
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert len(values) == len(attrs), tag
        self.tags.append((tag, values))
        if tag not in self.VOID:
            self.open.append((tag, values.get("id")))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop()[0] == tag
        if tag in ("td", "th"):
            self.handle_data(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        for tag, name in self.open:
            if tag in ("section", "article") and name:
                self.text[name] = self.text.get(name, "") + data

    def attributes(self, name: str) -> list[str]:
        return [str(values[name]) for _, values in self.tags if name in values]


def written(run: Run, folder: Path) -> tuple[str, Page]:
    write_report(run, folder / "page.html")
    html = (folder / "page.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_one_self_contained_page(run_folder: Path, finished: Run) -> None:
    html = (run_folder / "report.html").read_text()
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert not page.attributes("src")
    links = page.attributes("href")
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert all(link == "data:," or (link[0] == "#" and link[1:] in ids) for link in links)
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert " at 0x" not in html and "nan" not in re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    sections = ["summary", "graph", "programs", "interventions", "effects", "held-out", "loss", "run"]
    assert [name for tag, values in page.tags if tag == "section" for name in [values["id"]]] == sections
    assert finished.info["identification"]["reason"] in page.text["summary"]
    assert "counts: all values are whole numbers" in page.text["run"]


def test_the_programs_are_told(run_folder: Path, finished: Run) -> None:
    page = Page((run_folder / "report.html").read_text())
    for name, program in finished.described.items():
        card = page.text[name]
        assert card.startswith(name)
        for word in (
            program.title,
            *program.drivers["perturbation"],
            *program.up["gene"][:8],
            *program.down["gene"][:8],
        ):
            assert word in card
        assert f"stability {program.stability:.2f}" in card
        for other in (*program.upstream, *program.downstream):
            assert other in card


def test_findings_answers_and_limitations_come_first(run_folder: Path, finished: Run) -> None:
    text = " ".join(Page((run_folder / "report.html").read_text()).text["summary"].split())
    sentences = [one.sentence for one in findings(finished)]
    steps = what_next(finished, answers(finished.facts, finished.evaluation, finished.history))
    places = [text.index(words) for words in (*sentences, *steps, *limitations(finished))]
    assert places == sorted(places)


def test_every_question_mark_opens_a_meaning(run_folder: Path) -> None:
    page = Page((run_folder / "report.html").read_text())
    opened = {values["popovertarget"] for tag, values in page.tags if values.get("class") == "help"}
    meanings = {values["id"] for _, values in page.tags if "popover" in values}
    assert opened <= meanings and len(opened) > 15
    headers = re.findall(r'<th class="n">(.*?)</th>', (run_folder / "report.html").read_text())
    assert [words for words in headers if "<button" not in words] == 2 * [
        "no change"
    ]  # beside the columns of the model


def test_methods_and_citation(run_folder: Path, finished: Run) -> None:
    text = " ".join(Page((run_folder / "report.html").read_text()).text["run"].split())
    facts = finished.facts
    assert f"fitted with crlseq {facts.version} (preset default, seed {facts.seed})" in text
    assert (
        f"{facts.metrics.n_detected} of 7 perturbations have a detectable effect at a false discovery rate of 0.05"
        in text
    )
    assert f"misfit at most 1.1, here {facts.discovery.dispersion:.2f}" in text if facts.discovery else False
    assert f"torch {facts.packages['torch']}" in text and "arXiv:2307.06250." in text


def test_gene_sets_are_in_the_findings(tmp_path: Path) -> None:
    run = synthetic_run(2, 4)
    rows = [("P0", "drivers", "", "INTERFERON", "", 10, 3, 2.0, 1e-7, 1e-6, "A, B")]
    columns = ["program", "test", "direction", "gene_set", "description", "size", "overlap", "score", "p_value", "fdr", "genes"]  # fmt: skip
    write_report(run, tmp_path / "page.html", pd.DataFrame(rows, columns=columns))
    text = Page((tmp_path / "page.html").read_text(encoding="utf-8")).text["summary"]
    assert "(perturbations of INTERFERON, FDR 1e-6)." in text


def test_the_graph_is_told(run_folder: Path, finished: Run) -> None:
    page = Page((run_folder / "report.html").read_text())
    # Twice: with labels, and for a phone without.
    nodes = [values for tag, values in page.tags if tag == "a" and values.get("class") == "node"]
    assert [node["data-name"] for node in nodes] == 2 * finished.program_names
    edges = [values for tag, values in page.tags if tag == "path" and "data-source" in values]
    assert [(edge["data-source"], edge["data-target"]) for edge in edges] == 2 * list(finished.dag.edges)
    edges = edges[: len(edges) // 2]
    for edge, row in zip(edges, finished.edges.to_dict("records"), strict=True):
        assert f"weight {row['weight']:+.2f}" in str(edge["data-about"])
        assert f"support {row['support']:.2f}" in str(edge["data-about"])
        assert edge["marker-end"] == ("url(#raises)" if row["weight"] > 0 else "url(#lowers)")


def test_every_pair_is_in_the_matrix_and_in_words(tmp_path: Path) -> None:
    known = {
        (0, 1): {"status": "upstream", "change": 0.5, "z": 10.0},
        (1, 2): {"status": "both ways", "change": -0.4, "z": -8.0}, (2, 1): {"status": "both ways", "change": 0.4, "z": 8.0},
        (2, 0): {"status": "undecided", "se": np.nan, "z": np.nan, "change": np.nan, "detectable": np.nan},
    }  # fmt: skip
    run = with_pairs(synthetic_run(3, 9, [(0, 1)], verdict="partly identified"), known)
    html, page = written(run, tmp_path)
    cells = [values for tag, values in page.tags if tag == "td" and "title" in values]
    assert [cell["class"] for cell in cells] == [
        "upstream raises", "excluded", "excluded", "both-ways", "undecided", "both-ways",
    ]  # fmt: skip
    labels = [program.label for program in run.facts.programs]
    assert str(cells[0]["title"]).startswith(f"P0 ({labels[0]}) → P1 ({labels[1]})\nP0 is upstream of P1")
    text = page.text["graph"]
    assert all(str(cell["title"]).split("\n")[1] in text for cell in cells)
    assert "6 ordered pairs: 1 upstream, 2 both ways (1 seen from either side), 2 excluded, 1 undecided." in text
    assert [mark for mark in text.split() if mark in "+⇄"][:3] == ["+", "⇄", "⇄"]
    assert "Edges are drawn between programs whose order is shown; there may be others." in text
    assert "nan" not in re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)


def test_many_pairs_are_cut_in_words_alone(tmp_path: Path) -> None:
    html, page = written(with_pairs(synthetic_run(50, 100), {}), tmp_path)
    assert sum("title" in values for tag, values in page.tags if tag == "td") == 50 * 49
    assert "First 300 of 2450; the rest is in pairs.csv." in page.text["graph"]
    assert len(html.encode()) < 2_500_000


def test_hit_cells_are_told_where_they_can_be(tmp_path: Path) -> None:
    run = synthetic_run(2, 4)
    shares = run.interventions.assign(
        penetrance=[0.78, np.nan, 0.5, np.nan], penetrance_error=[0.02, np.nan, 0.1, np.nan]
    )
    html, page = written(replace(run, interventions=shares), tmp_path)
    text = " ".join(page.text["interventions"].split())
    assert "0.78 ± 0.02" in text and "0.50 ± 0.10" in text and text.count("±") == 2
    assert "means-hit" in html
    assert "penetrance" not in written(run, tmp_path)[1].text["interventions"]  # of a run of format 1


def test_second_targets_are_told(tmp_path: Path) -> None:
    rows = {"perturbation": ["PERT1"], "program": ["P0"], "shift": [-0.82], "se": [0.11], "z": [-7.5], "fdr": [1e-9]}
    run = replace(synthetic_run(2, 4), second_targets=pd.DataFrame(rows))
    text = " ".join(written(run, tmp_path)[1].text["interventions"].split())
    assert "also shift another program" in text and re.search(r"PERT1 P0 -0\.82 ± 0\.11 1e-09", text)
    assert "also shift" not in written(synthetic_run(2, 4), tmp_path)[1].text["interventions"]


def test_names_stay_text(tmp_path: Path) -> None:
    run = with_pairs(synthetic_run(3, 12, [(0, 1)], names=[*EVIL, *EVIL, "a", "b"], genes=[*EVIL, "A", "B", "C"]), {})
    info = json.loads(json.dumps(run.info))
    info["notes"], info["input"]["path"], info["label_reason"] = EVIL, EVIL[0], EVIL[1]
    info["config"]["preset"], info["config"]["data"]["hold_out"] = EVIL[1], EVIL
    info["command"] = EVIL[2]
    html, page = written(replace(run, info=info), tmp_path)
    assert {tag for tag, _ in page.tags} & {"img", "iframe", "object", "embed"} == set()
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [name for _, values in page.tags for name in values if name.startswith("on")]
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") >= 8
    assert "{{ 7*7 }}" in html
    clean, _ = written(synthetic_run(3, 12, [(0, 1)]), tmp_path)
    script = re.search(r"<script>.*</script>", clean, re.DOTALL)
    assert script is not None and script[0] in html  # no name in it


def test_the_content_security_policy_is_that_of_the_script(run_folder: Path) -> None:
    import base64
    import hashlib

    html = (run_folder / "report.html").read_text()
    script = html.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html


def test_a_large_screen_still_opens(tmp_path: Path) -> None:
    """10,000 perturbations and 50 programs: under 5 MB, tables cut and said so."""
    names = [f"A_PERTURBATION_WITH_A_LONG_NAME_{k}" for k in range(10_000)]
    edges = [(a, a + step) for a in range(40) for step in (1, 4)]
    run = synthetic_run(50, 10_000, edges, n_genes=300, epochs=200, names=names)
    html, page = written(run, tmp_path)
    assert len(html.encode()) < 2_500_000
    assert "First 300 of 10000; the rest is in interventions.csv." in page.text["interventions"]
    assert "The 150 strongest of 9000; the rest is in interventions.csv." in page.text["interventions"]
    assert "First 300 of 10000; the rest is in evaluation.csv." in page.text["held-out"]
    assert "First 1000 conditions." in page.text["held-out"]
    assert "The 40 largest of 10000" in page.text["effects"]
    assert "more, in interventions.csv" in page.text["P48"]
    assert len(page.tags) < 30_000


def test_without_edges_effects_epochs_or_evaluation(tmp_path: Path) -> None:
    run = synthetic_run(2, 6, epochs=0, verdict="not identified")
    none = run.interventions.assign(program="", shift=np.nan, support=np.nan, fdr=0.9)
    bare = replace(run, interventions=none, evaluation=run.evaluation.iloc[:0])
    html, page = written(bare, tmp_path)
    assert "No edge is declared between 2 programs; the graph is not identified." in page.text["graph"]
    assert html.count("no detectable effect, no target claimed") == 6
    assert "No perturbation targets it." in page.text["P0"]
    assert "held-out" not in page.text and "loss" not in page.text
    assert "there is nothing to map" in page.text["interventions"]
    assert all(f'href="#{name}"' not in html for name in ("held-out", "loss"))
    untested = bare.interventions.assign(energy_distance=np.nan, p_value=np.nan, fdr=np.nan)
    assert (
        "No single perturbation was tested"
        in written(replace(bare, interventions=untested), tmp_path)[1].text["effects"]
    )


def test_tables_of_evaluate_are_in_it(copied_run: Path) -> None:
    succeeds("evaluate", copied_run, "--output", copied_run / "baselines.csv")
    (copied_run / "notes.csv").write_text("anything,else\n1,2\n")
    (copied_run / "broken.csv").write_bytes(b"\xff\xfe\x00condition,group")
    succeeds("report", copied_run)
    page = Page((copied_run / "report.html").read_text())
    text = " ".join(page.text["held-out"].split())
    table = pd.read_csv(copied_run / "baselines.csv")
    means = table[table["group"] == table["group"].iloc[0]].groupby("predictor")["l2"].mean()
    assert "crlseq evaluate: baselines.csv" in text
    for name, title in (("model", "model"), ("ridge", "ridge"), ("additive", "sum of training effects")):
        assert re.search(rf"{title} [-–.0-9]+ [-–.0-9]+ {means[name]:.3g} ", text), title
    assert "By baselines.csv, against the best baseline" in page.text["summary"]
    assert "notes.csv" not in text and "broken.csv" not in text
    crlseq.load(copied_run)


def test_report_command(run_folder: Path, copied_run: Path, tmp_path: Path) -> None:
    succeeds("report", run_folder, "--output", tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_bytes() == (run_folder / "report.html").read_bytes()
    (copied_run / "report.html").write_text("old")
    answer = invoke("report", copied_run)
    assert (answer.code, answer.out) == (0, "")
    assert (copied_run / "report.html").read_bytes() == (run_folder / "report.html").read_bytes()
    before = files_below(tmp_path)
    for path, words in ((tmp_path / "new" / "page.html", "--force"), (tmp_path / "new", "folder"), (copied_run / "run.json" / "x.html", "cannot be written")):  # fmt: skip
        check_refusal(*invoke("report", run_folder, "--output", path), 3, words)
    assert files_below(tmp_path) == before
    succeeds("report", run_folder, "--output", tmp_path / "new" / "page.html", "--force")


# --- charts


def test_agreement_of_seeds(tmp_path: Path) -> None:
    run = synthetic_run(2, 4, [(0, 1)])
    assert "seeds" not in written(run, tmp_path)[1].text
    rows = [
        ("program", "P0", "", 0.95, np.nan, np.nan), ("program", "P1", "", 0.4, np.nan, np.nan),
        ("intervention", "PERT0", "P0", 1.0, -1.234, 0.056), ("intervention", "PERT1", "P1", 0.5, 2.0, 0.5),
        ("edge", "P0", "P1", 1.0, -0.7, 0.01),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["kind", "source", "target", "agreement", "mean", "sd"])
    training = {"kept_seed": 1, "seed_losses": [0.25, -0.00004, None]}
    run = with_info(replace(run, ensemble=table), training=training, config={"training": {"ensemble": 3}})
    text = written(run, tmp_path)[1].text["seeds"]
    assert "3 models with seeds 0 to 2; the model of seed 1 has the lowest validation loss" in text
    assert "between 0.0000 and 0.2500" in text  # not -0.0000
    assert "1 of 2 programs have" in text and "1 of 2 perturbations shift" in text and "1 of 1 edges are" in text
    assert re.search(r"PERT0\s+P0\s+1\.00\s+-1\.23\s+0\.06", text)
    assert "found by the likelihood" not in text  # of a graph that each seed learned for itself


def test_ticks() -> None:
    assert list(_ticks(0.0, 1.0, False)) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert list(_ticks(-0.03, 0.11, False)) == [-0.05, 0.0, 0.05, 0.1, 0.15]
    assert list(_ticks(1.0, 100.0, True)) == [20.0, 40.0, 60.0, 80.0, 100.0]
    assert list(_ticks(1.0, 3.0, True)) == [1.0, 2.0, 3.0]


def test_losses() -> None:
    history = pd.DataFrame({"epoch": [0, 1, 2], "mmd": [3.0, 2.0, 1.0], "graph": [5.0] * 3, "temperature": [1, 2, 3], "total": [4.0, np.nan, 2.0], "validation_total": [5.0, 4.0, 3.0]})  # fmt: skip
    charts = losses(history)
    assert [chart["title"] for chart in charts] == ["total", "mmd"]  # one that never changes tells nothing
    training, validation = charts[0]["lines"]
    assert (training["name"], len(training["points"]), len(validation["points"])) == ("training", 2, 3)
    xs, ys = zip(*validation["points"], strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys)  # falls, and y grows downwards
    assert losses(pd.DataFrame({"epoch": [0], "total": [1.0]}))[0]["lines"][0]["points"]


def test_effects_are_in_order_and_place() -> None:
    run = synthetic_run(2, 20)
    chart = effects(run)
    assert chart is not None
    xs = [row["x"] for row in chart["rows"]]
    assert xs == sorted(xs, reverse=True)
    assert [row["found"] for row in chart["rows"]].count(False) == 2
    assert all(chart["left"] <= x <= chart["width"] for x in xs)
    assert chart["ticks"][0] == (chart["zero"], "0")


def test_the_map_has_a_cell_a_perturbation() -> None:
    run = synthetic_run(3, 20)
    found = found_by_bootstrap(3, {"PERT0": [0.5, 0.5, 0.0]})
    chart = intervention_map(with_info(run, discovery=found))
    assert chart is not None
    assert len(chart["rows"]) == 18
    row = next(row for row in chart["rows"] if row["name"] == "PERT0")
    assert [ring["program"] for ring in row["rings"]] == ["P1"]
    assert max(row["share"] for row in chart["rows"]) == 1

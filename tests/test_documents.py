"""Pages under docs/ against the program: commands, files and columns, links, and the notebook; the README's length."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from packaging.requirements import Requirement

import crlseq
from crlseq.data.store import MANIFEST
from crlseq.experiments.benchmark import COLUMNS
from crlseq.export.registry import FORMATS
from crlseq.run.columns import (
    ARM_COLUMNS,
    CELL_COLUMNS,
    CONTEXT_COLUMNS,
    COVARIATE_COLUMNS,
    GUIDE_COLUMNS,
    PATHWAY_COLUMNS,
)
from crlseq.run.run import Run
from crlseq.storage.runfolder import GENE_SETS
from scripts.outputs import differing
from scripts.reference import reference
from tests.support import FAST, ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def test_the_command_reference_is_up_to_date() -> None:
    page = reference()
    assert "`--hold-out-cells`" in page and "## crlseq inspect program\n" in page
    assert (DOCS / "commands.md").read_text(encoding="utf-8") == page, (
        "The program's options have changed: run .venv/bin/python scripts/reference.py"
    )


# --- links


def anchors(page: Path) -> set[str]:
    """Headings of a page as GitHub turns them into anchors."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_project_that_a_page_names_exist(page: Path) -> None:
    """Named from the root, from the package, or by the end of their path."""
    named = set(re.findall(r"`([a-z_][a-z_0-9/]*(?:\.py|/))`", page.read_text(encoding="utf-8")))
    there = {
        f"/{path.relative_to(ROOT)}"
        for top in ("crlseq", "tests", "scripts", "docs", "data")
        for path in (ROOT / top, *(ROOT / top).rglob("*"))
    }
    named.discard("data/public/")  # scripts/download makes it
    missing = [name for name in sorted(named) if not any(path.endswith(f"/{name.rstrip('/')}") for path in there)]
    assert not missing, ", ".join(missing)


# --- installation


@pytest.fixture
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def test_extras_that_are_named_exist(project: dict[str, Any]) -> None:
    """In documents, and in messages about a missing library."""
    there = project["optional-dependencies"]
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = {
        *re.findall(r"pip install '\.\[(\w+)\]'", text),
        *(about.extra for about in FORMATS.values() if about.extra),
        *re.findall(r'needs_extra\(.*"(\w+)"\)', (ROOT / "crlseq/readout/enrichment.py").read_text(encoding="utf-8")),
    }
    assert {"enrich", "mudata"} <= named <= there.keys()
    assert "pip install 'crlseq" not in text, "the name is not on PyPI"
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "install.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(rows) == there.keys()


def test_the_recipe_needs_what_the_package_needs(project: dict[str, Any]) -> None:
    recipe = pytest.importorskip("yaml").safe_load((ROOT / "recipe" / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["context"]["version"] == crlseq.__version__
    of_conda = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    # One package for all versions of Python: what the lowest needs.
    lowest = {"python_version": recipe["context"]["python_min"]}
    needed = [Requirement(line) for line in project["dependencies"]]
    used = [one for one in needed if one.marker is None or one.marker.evaluate(lowest)]
    wanted = {f"{of_conda.get(one.name, one.name)} {one.specifier}" for one in used}
    assert {line for line in recipe["requirements"]["run"] if not line.startswith("python ")} == wanted
    assert f">={recipe['context']['python_min']}" == project["requires-python"]
    scripts = {f"{name} = {place}" for name, place in project["scripts"].items()}
    assert set(recipe["build"]["python"]["entry_points"]) == scripts


def test_every_public_name_is_on_the_page_of_the_interface() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    whole, plots = page.split("crlseq.pl\n", 1)
    plots, _, rest = plots.partition("## ")
    documented = set(re.findall(r"^\.\. auto\w+:: (\w+)$", whole + rest, flags=re.MULTILINE))
    assert documented == {name for name in crlseq.__all__ if callable(getattr(crlseq, name))}
    assert set(re.findall(r"^\.\. auto\w+:: (\w+)$", plots, flags=re.MULTILINE)) == set(crlseq.pl.__all__)


# --- README.md


def test_the_front_page_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 650
    assert len(re.findall(r"!\[", text)) == 1


# --- docs/formats.md


def table(heading: str) -> list[str]:
    """What stands in backticks in the first column of the tables below a heading of the page, before the next one."""
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    body = re.split(r"^#+ ", page.split(f" {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    cells = [line.split("|")[1] for line in body.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall("`([^`]+)`", cell)]


@pytest.fixture(scope="module")
def wide_run(screen_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with an ensemble and embeddings."""
    folder = tmp_path_factory.mktemp("wide")
    vectors = pd.DataFrame(np.random.default_rng(0).normal(size=(8, 3)), index=[f"g{i}" for i in range(8)])
    vectors.to_csv(folder / "vectors.csv")
    return crlseq.fit(screen_file, folder / "RUN", ensemble=2, embeddings=str(folder / "vectors.csv"), **FAST)


@pytest.fixture(scope="module")
def folders(run_folder: Path, wide_run: Run) -> list[Path]:
    assert wide_run.path is not None
    return [run_folder, wide_run.path]


def test_every_file_of_a_run_is_described(folders: list[Path]) -> None:
    there = {path.name for folder in folders for path in folder.iterdir()}
    optional = {"pathways.csv", "guides.csv", "arms.csv", "covariates.csv", "contexts.csv"}
    assert set(table("The run folder")) == there | {GENE_SETS, *optional}
    assert table("pathways.csv") == list(PATHWAY_COLUMNS)
    assert table("guides.csv") == list(GUIDE_COLUMNS)
    assert table("arms.csv") == list(ARM_COLUMNS)
    assert table("covariates.csv") == list(COVARIATE_COLUMNS)
    assert table("contexts.csv") == list(CONTEXT_COLUMNS)


@pytest.mark.parametrize(
    "name",
    [
        "programs",
        "interventions",
        "pairs",
        "second_targets",
        "dag",
        "history",
        "evaluation",
        "ensemble",
        "interactions",
    ],
)
def test_every_column_is_described(folders: list[Path], name: str) -> None:
    paths = [path for folder in folders if (path := folder / f"{name}.csv").exists()]
    assert set(table(f"{name}.csv")) == {column for path in paths for column in pd.read_csv(path)}


# Described as a whole: what is within has names from the data, or a page of its own.
WHOLE = {
    *("config", "packages", "guides", "gene_sets", "positions", "contexts", "conditions[].cells"),
    *("discovery.held_out", "discovery.n_latents_curve", "discovery.pairs.counts"),
}


def keys(value: Any, name: str = "") -> Iterator[str]:
    """Names of what is within: ``a.b`` of dictionaries, ``a[].b`` of lists of dictionaries."""
    if name in WHOLE:
        yield name
    elif isinstance(value, dict) and value:
        if name in ("discovery", "discovery.bootstrap", "discovery.pairs", "embeddings", "combinations"):  # may be null
            yield name
        for key, own in value.items():
            yield from keys(own, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for own in value:
            yield from keys(own, f"{name}[]")
    else:
        yield name


def test_every_key_of_run_json_is_described(folders: list[Path]) -> None:
    found = {key for folder in folders for key in keys(json.loads((folder / "run.json").read_text()))}
    assert set(table("run.json")) == found


def test_every_attribute_of_the_graph_is_described(run_folder: Path) -> None:
    graph = json.loads((run_folder / "dag.json").read_text())
    found = set(graph["graph"]).union(*graph["nodes"], *graph["edges"]) - {"id", "source", "target"}
    assert set(table("dag.json")) == found
    namespace = "{http://graphml.graphdrawing.org/xmlns}key"
    assert {key.get("attr.name") for key in ElementTree.parse(run_folder / "dag.graphml").iter(namespace)} == found


def element_names(adata: ad.AnnData) -> set[str]:
    """``slot["key"]`` of all slots; of crlseq's part of uns what is in it."""
    names = {f'{slot}["{key}"]' for slot in ("obs", "var", "obsm", "varm", "uns") for key in getattr(adata, slot)}
    return (names - {'uns["crlseq"]'}) | {f'uns["crlseq"]["{key}"]' for key in adata.uns.get("crlseq", {})}


def test_every_anndata_key_is_described(run_folder: Path, screen_file: Path) -> None:
    added = element_names(ad.read_h5ad(run_folder / "crlseq.h5ad")) - element_names(ad.read_h5ad(screen_file))
    optional = {'obs["crlseq_perturbation"]'}
    assert set(table("AnnData keys")) == added | optional
    assert {f'obs["{name}"]' for name in CELL_COLUMNS} == {key for key in added if key.startswith("obs[")} | optional


def test_simulations_and_benchmarks_are_described() -> None:
    adata = crlseq.simulate(
        n_latents=3, n_genes=9, cells_per_perturbation=4, n_control=9, guides=2, penetrance=(0.5, 1.0), n_batches=2,
        cell_cycle=True, loading_density=0.5, hidden=1, genewise_dispersion=True, depth_by_condition=0.1,
    )  # fmt: skip
    found = element_names(adata) - {'uns["truth"]'} | {f'uns["truth"]["{key}"]' for key in adata.uns["truth"]}
    assert {name for name in table("crlseq simulate") if "[" in name} == found
    assert table("True targets") == list(adata.uns["truth"]["target"].columns)
    assert table("benchmark.csv") == list(COLUMNS)


def test_predictions_and_judgements_are_described(finished: Run) -> None:
    found = element_names(finished.predict("g0", n_cells=4, counterfactual=True))
    assert set(table("crlseq predict")) == found
    assert set(table("crlseq evaluate")) == set(crlseq.evaluate(finished).conditions)
    pytest.importorskip("gseapy")
    sets = {"set": [f"gene{i}" for i in range(10)]}
    assert table("crlseq inspect programs --gene-sets") == list(crlseq.enrich(finished, sets))


def test_the_manifest_of_a_store_is_described(screen_file: Path, tmp_path: Path) -> None:
    crlseq.prepare([screen_file], tmp_path / "STORE")
    assert table("crlseq.json") == list(json.loads((tmp_path / "STORE" / MANIFEST).read_text()))


# --- docs/notebook.ipynb


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    path = DOCS / "notebook.ipynb"
    assert path.stat().st_size < 300_000
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert all(cell.outputs or cell.source.lstrip().startswith("import") for cell in code)
    again = nbformat.from_dict(json.loads(json.dumps(stored)))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # A cell that raises ends the run in an error.
    nbclient.NotebookClient(
        again, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    kinds = [[output.output_type for output in cell.outputs] for cell in again.cells if cell.cell_type == "code"]
    assert kinds == [[output.output_type for output in cell.outputs] for cell in code]
    assert (tmp_path / "RUN" / "report.html").is_file()
    printed = [
        [str(output.get("text") or output.get("data", {}).get("text/plain", "")) for output in cell.outputs]
        for notebook in (stored, again)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    half = len(printed) // 2
    for then, now in zip(printed[:half], printed[half:], strict=True):
        assert [line for pair in zip(then, now, strict=True) for line in differing(*pair)] == []

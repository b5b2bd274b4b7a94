"""Files from strangers: nothing in them is run, nothing outside them is read or written, no name steers anything."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import networkx as nx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import crlseq
from crlseq.cli.output import show_json, show_text
from crlseq.errors import InputError
from crlseq.storage.csv import read_csv, to_csv
from tests.support import RUN_FILES, check_refusal, dense, edited, fit_h5ad, invoke, relabelled, small_screen, succeeds


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


# --- pickles


def as_pickle(mark: Path) -> bytes:
    return pickle.dumps(Payload(mark), protocol=2)


def as_torch_file(mark: Path) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save({"identity": Payload(mark)}, buffer)
    return buffer.getvalue()


def as_numpy_file(mark: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def test_the_payloads_are_dangerous(tmp_path: Path) -> None:
    pickle.loads(as_pickle(tmp_path / "mark"))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", sorted(RUN_FILES))
def test_pickles_in_a_run_folder(run_folder: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    for i, make in enumerate((as_pickle, as_torch_file, as_numpy_file)):
        copy = tmp_path / f"RUN{i}"
        shutil.copytree(run_folder, copy)
        (copy / name).write_bytes(make(mark))
        words = [
            ["inspect", copy],
            ["report", copy],
            ["export", copy, "--format", "h5ad", "--output", tmp_path / f"{i}.h5ad"],
        ]
        for word in words[: 1 if name.endswith(".json") else 3]:
            answer = invoke(*word)
            assert answer.code in (0, 3) and "Traceback" not in answer.err
        assert not mark.exists()


@pytest.mark.parametrize("make", [as_pickle, as_torch_file, as_numpy_file])
def test_pickles_as_checkpoint(screen_file: Path, tmp_path: Path, make: Callable[[Path], bytes]) -> None:
    (tmp_path / "RUN.partial").mkdir()
    (tmp_path / "RUN.partial" / "resume.pt").write_bytes(make(tmp_path / "mark"))
    words = ["--method", "gradient", "--epochs", 1, "--resume"]
    answer = invoke("fit", screen_file, "--output", tmp_path / "RUN", *words)
    assert answer.code == 3, answer.err
    assert not (tmp_path / "mark").exists()


def test_pickles_in_a_screen(tmp_path: Path) -> None:
    content = as_pickle(tmp_path / "mark")
    adata = small_screen()
    adata.uns["bytes"] = np.frombuffer(content, dtype=np.uint8)
    adata.uns["text"] = adata.obs["text"] = content.decode("latin-1").replace("\0", "")
    adata.write_h5ad(tmp_path / "screen.h5ad")
    with h5py.File(tmp_path / "screen.h5ad", "r+") as handle:
        handle["uns/void"] = np.void(content)
        handle["uns"].attrs["void"] = np.void(content)
        handle["uns/void"].attrs["encoding-type"] = "pickle"
        handle["uns/void"].attrs["encoding-version"] = "0.1.0"
    succeeds("fit", tmp_path / "screen.h5ad", "-o", tmp_path / "RUN", "--method", "gradient", "--epochs", 1)
    succeeds("report", tmp_path / "RUN")
    assert not (tmp_path / "mark").exists()


PICKLED_ZARR: list[dict[str, Any]] = [
    {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}], "compressor": None},
    {"dtype": "|O", "filters": [{"id": "vlen-utf8"}], "compressor": {"id": "pickle", "protocol": 5}},
    {"dtype": "|O", "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}], "compressor": None},
    {"dtype": "<f8", "filters": None, "compressor": {"id": "pickle", "protocol": 5}},
]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:zarr v3 will become:DeprecationWarning")
@pytest.mark.parametrize("codecs", PICKLED_ZARR)
def test_pickles_in_a_zarr_store(tmp_path: Path, codecs: dict[str, Any]) -> None:
    """Its codecs are chosen by the store, and one of them is pickle."""
    store = tmp_path / "screen.zarr"
    with ad.settings.override(zarr_write_format=2):
        small_screen().write_zarr(store)
    shutil.rmtree(store / "obs" / "perturbation")
    (store / ".zmetadata").unlink(missing_ok=True)
    column = store / "obs" / "perturbation"
    column.mkdir()
    record = {"zarr_format": 2, "shape": [280], "chunks": [280], "fill_value": 0, "order": "C", **codecs}
    (column / ".zarray").write_text(json.dumps(record))
    kind = "string-array" if codecs["dtype"] == "|O" else "array"
    (column / ".zattrs").write_text(json.dumps({"encoding-type": kind, "encoding-version": "0.2.0"}))
    (column / "0").write_bytes(as_pickle(tmp_path / "mark"))
    check_refusal(*invoke("check", store), 3)
    assert not (tmp_path / "mark").exists()


# --- what lies outside


def test_a_run_folder_with_a_link_out_of_it(copied_run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.html").write_text("precious")
    (copied_run / "report.html").unlink()
    (copied_run / "report.html").symlink_to("../secret.html")
    for words in (["report"], ["inspect"], ["evaluate"]):
        check_refusal(*invoke(*words, copied_run), 3, "report.html", "a link that leads out of")
    assert (tmp_path / "secret.html").read_text() == "precious"
    # Links within are nobody's business, nor is a link to the folder.
    (copied_run / "report.html").unlink()
    (copied_run / "again.csv").symlink_to("dag.csv")
    (tmp_path / "link").symlink_to(copied_run)
    assert crlseq.load(tmp_path / "link").program_names == ["P0", "P1", "P2"]


@pytest.mark.parametrize("name", ["graphml", "json"])
def test_a_link_at_an_output_is_replaced_and_not_followed(run_folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out").symlink_to("precious")
    succeeds("export", run_folder, "--format", name, "--output", tmp_path / "out", "--force")
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "precious").read_text() == "precious"
    assert {file.name for file in tmp_path.iterdir()} == {"out", "precious"}


def external_link(handle: h5py.File, secret: Path) -> None:
    del handle["layers"]
    handle["layers"] = h5py.ExternalLink(str(secret), "/layers")


def external_storage(handle: h5py.File, secret: Path) -> None:
    shape = handle["X"].shape
    del handle["X"]
    # The bytes of any file at all.
    x = handle.create_dataset("X", shape, dtype="u1", external=[(str(secret), 0, int(np.prod(shape)))])
    x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def virtual_source(handle: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout(shape=handle["X"].shape, dtype="f4")
    layout[:] = h5py.VirtualSource(str(secret), "X", shape=handle["X"].shape)
    del handle["X"]
    handle.create_virtual_dataset("X", layout).attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def virtual_circle(*names: str) -> Callable[[h5py.File, Path], None]:
    """Each takes its values from the next, and the last from the first."""

    def plant(handle: h5py.File, secret: Path) -> None:
        shape = handle["X"].shape
        del handle["X"]
        for name, source in zip(names, [*names[1:], names[0]], strict=True):
            layout = h5py.VirtualLayout(shape=shape, dtype="f4")
            layout[:] = h5py.VirtualSource(".", source, shape=shape)
            made = handle.create_virtual_dataset(name, layout)
            made.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    return plant


def link_to_an_external_link(handle: h5py.File, secret: Path) -> None:
    """Which is found later than the link to it; to open a pipe would never end."""
    os.mkfifo(secret.with_name("pipe"))
    handle["uns/a"] = h5py.ExternalLink(str(secret.with_name("pipe")), "/X")
    del handle["X"]
    handle["X"] = h5py.SoftLink("/uns/a")


PLANTS = [external_link, external_storage, virtual_source, link_to_an_external_link]


@pytest.mark.parametrize(
    "plant", [*PLANTS, virtual_circle("X"), virtual_circle("X", "Y"), virtual_circle("X", "Y", "Z")]
)
def test_an_h5ad_that_takes_data_from_another_file(tmp_path: Path, plant: Callable[[h5py.File, Path], None]) -> None:
    adata = small_screen()
    adata.X = dense(adata).astype(np.float32)
    adata.layers["more"] = adata.X
    adata.write_h5ad(tmp_path / "secret.h5ad")
    with edited(tmp_path / "secret.h5ad", tmp_path / "screen.h5ad") as handle:
        plant(handle, tmp_path / "secret.h5ad")
    check_refusal(*invoke("check", tmp_path / "screen.h5ad"), 3, "from another file")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_zarr_store_with_a_link_out_of_it(tmp_path: Path) -> None:
    small_screen().write_zarr(tmp_path / "screen.zarr")
    shutil.move(tmp_path / "screen.zarr" / "X", tmp_path / "secret")
    (tmp_path / "screen.zarr" / "X").symlink_to("../secret")
    check_refusal(*invoke("check", tmp_path / "screen.zarr"), 3, "a link that leads out of")


# --- names

HOSTILE = ["=cmd|'/C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\x1b]0;owned\x07\x1b[2J", "<img src=x onerror=alert(1)>"]


def test_hostile_names(tmp_path: Path) -> None:
    adata = relabelled(**dict(zip([f"g{i}" for i in range(6)], HOSTILE, strict=True)))
    adata.var_names = [*HOSTILE, "\x9b31mred", "a\u202eb", *(f"]]></data>{i}" for i in range(32))]
    names = list(adata.var_names)
    run = fit_h5ad(adata, tmp_path, "--perturbation-key", "perturbation", "--separator", "")
    folder = tmp_path / "RUN"
    assert sorted(run.interventions["perturbation"]) == sorted(HOSTILE)
    assert set(run.programs["gene"]) == set(names)
    for table in ("programs", "interventions", "evaluation"):
        with (folder / f"{table}.csv").open(newline="", encoding="utf-8") as handle:
            for row in csv.DictReader(handle):
                for column in ("gene", "perturbation", "condition"):
                    assert row.get(column, "x")[0] not in "=+-@\t\r\n"
    page = (folder / "report.html").read_text()
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    graph = nx.read_graphml(folder / "dag.graphml")
    assert list(graph) == ["P0", "P1"]
    assert ad.read_h5ad(folder / "crlseq.h5ad").var_names.tolist() == names
    for words in (["programs"], ["interventions"], ["dag"], []):
        answer = succeeds("inspect", *words, folder)
        assert not set("\x1b\x07\x9b\u202e") & set(answer.out + answer.err)
        listed = invoke("inspect", *words, folder, "--json")
        assert not set("\x1b\x07\x9b\u202e") & set(listed.out)
        json.loads(listed.out)
    genes = {row["gene"] for row in json.loads(invoke("inspect", "programs", folder, "--top", 40, "--json").out)}
    assert genes == set(names)
    checked = invoke("check", tmp_path / "screen.h5ad")
    assert not set("\x1b\x07\x9b\u202e") & set(checked.out + checked.err)
    refused = invoke("predict", folder, "-p", HOSTILE[4] + "x", "-o", tmp_path / "virtual.h5ad")
    assert refused.code == 3 and "\x1b" not in refused.err
    steering = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
    out = tmp_path / "out"
    for name in ("csv", "graphml", "json", "cyjs", "dot", "network", "gmt", "rnk", "multiqc"):
        succeeds("export", folder, "--format", name, "--output", out / name)
    for kind in ("programs", "interventions", "dag"):
        succeeds("plot", folder, kind, "--output", out / f"{kind}.svg")
    texts = [path for path in (*folder.iterdir(), *out.rglob("*")) if path.is_file() and path.suffix not in BINARY]
    assert len(texts) > 25
    for path in texts:
        found = steering.search(path.read_bytes().decode())
        assert found is None, (path.name, found)
    assert "\\u202e" in (out / "gmt").read_text() + (out / "network").read_text()


BINARY = (".h5ad", ".pt", ".safetensors")
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
TRICKY = st.text(alphabet="'=+-@\t\r\n\",; Na", max_size=5) | st.text(alphabet="\\u202e\x1b0", max_size=9)


@given(st.lists(TEXT | TRICKY, max_size=6))
def test_names_come_back_from_csv(names: list[str]) -> None:
    path = Path(tempfile.gettempdir()) / f"names.{os.getpid()}.csv"
    table = pd.DataFrame({"gene": pd.Series(names, dtype=object), "loading": np.linspace(-1, 1, len(names))})
    try:
        path.write_bytes(to_csv(table))
        back = read_csv(path, {"gene": str, "loading": float}).astype({"gene": object})  # from pandas 3 on texts
        pd.testing.assert_frame_equal(back, table, check_exact=True)
        with path.open(newline="", encoding="utf-8") as handle:
            for gene, loading in list(csv.reader(handle))[1:]:
                assert not set("\x1b\r\u202e") & set(gene)
                assert gene[:1] not in ("=", "+", "-", "@", "\t", "\r", "\n")
                float(loading)
    finally:
        path.unlink()


def test_names_come_back_by_the_rule_in_the_docstring(tmp_path: Path) -> None:
    names = ["=1", "'=1", "'", "it's", "", "-x", "+", "@a", "''-", "MT-CO1"]
    table = pd.DataFrame({"gene": names})
    (tmp_path / "t.csv").write_bytes(to_csv(table))
    column = pd.read_csv(tmp_path / "t.csv", keep_default_na=False)["gene"]
    assert column.tolist() == ["'=1", "''=1", "'", "it's", "", "'-x", "'+", "'@a", "'''-", "MT-CO1"]
    assert column.str.replace(r"^'(?='*[=+@\t\r\n-])", "", regex=True).tolist() == names


def test_json_with_control_characters_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"name": "\x1b[31m\x7f\x9b\u202e\ud800é\n\t"}
    show_json(value)
    out = capsys.readouterr().out
    assert not set("\x1b\x7f\x9b\u202e\ud800") & set(out)
    assert json.loads(out) == value
    show_text("a\x1b[2Jb\tc\nd\re")
    assert capsys.readouterr().out == "a\\x1b[2Jb\tc\nd\\re\n"


# --- depth and size

DEEP = 10_000
TOML = {
    "lists": "a = " + "[" * DEEP + "]" * DEEP,
    "tables": "a = " + "{b = " * DEEP + "1" + "}" * DEEP,
    "keys": "a" + ".a" * DEEP + " = 1",
    "headers": "[a" + ".a" * DEEP + "]",
    "digits": "[training]\nseed = " + "9" * 100_000,
    "text": "[data]\nlayer = '" + "x" * (2 << 20) + "'",
}


@pytest.mark.parametrize("kind", list(TOML))
def test_deep_or_long_toml(screen_file: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "odd.toml").write_text(TOML[kind])
    answer = invoke("fit", screen_file, "--output", tmp_path / "RUN", "--config", tmp_path / "odd.toml")
    check_refusal(*answer, 2 if kind in ("keys", "headers") else 3)
    assert len(answer.err) < 500


@pytest.mark.parametrize("content", ["[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "9" * 100_000])
def test_deep_or_long_run_json(copied_run: Path, content: str) -> None:
    (copied_run / "run.json").write_text(content)
    check_refusal(*invoke("inspect", copied_run), 3, "damaged")


def test_long_run_json(copied_run: Path) -> None:
    with (copied_run / "run.json").open("r+") as handle:
        handle.truncate(1 << 30)  # a gigabyte that takes no room
    check_refusal(*invoke("inspect", copied_run), 3, "more than 256 MiB")


def with_architecture(path: Path, text: str) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path, metadata={"architecture": text})


@pytest.mark.parametrize("change", [{"n_genes": 10**11}, {"n_latents": 4}, {"n_hidden": "many"}, {"unknown": 1}])
def test_weights_that_claim_another_architecture(copied_run: Path, change: dict[str, Any]) -> None:
    from safetensors import safe_open

    path = copied_run / "model.safetensors"
    with safe_open(path, framework="pt") as handle:
        architecture = json.loads(handle.metadata()["architecture"])
    for text in (json.dumps({**architecture, **change}), "[" * DEEP + "]" * DEEP):
        with_architecture(path, text)
        with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
            _ = crlseq.load(copied_run).model


def test_a_file_that_claims_more_than_it_can_hold(screen_file: Path, tmp_path: Path) -> None:
    """Room is not made for it first: 8 TB here."""
    with edited(screen_file, tmp_path / "odd.h5ad") as handle:
        attributes = dict(handle["obs/perturbation/codes"].attrs)
        del handle["obs/perturbation/codes"]
        codes = handle["obs/perturbation"].create_dataset("codes", (10**12,), dtype="i8", chunks=(1 << 20,))
        codes.attrs.update(attributes)
    check_refusal(*invoke("check", tmp_path / "odd.h5ad"), 3, "claims to hold 80000")

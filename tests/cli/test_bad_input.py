"""Bad input through the real command line: one sentence, a hint, exit code 3 or 2, nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from tests.support import check_refusal, dense, edited, files_below, invoke, refused, small_screen

# --- files


def test_missing_file(folder: Path) -> None:
    refused(folder, folder / "none.h5ad", says=("There is no file", "none.h5ad"))


@pytest.mark.parametrize(
    "content",
    [b"", b"a,b\n1,2\n", np.random.default_rng(0).bytes(3000), b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + bytes(500)],
)
def test_not_an_h5ad(folder: Path, content: bytes) -> None:
    path = folder / "file.h5ad"
    path.write_bytes(content)
    refused(folder, path)


def test_hdf5_without_obs(folder: Path) -> None:
    with h5py.File(folder / "file.h5", "w") as handle:
        handle["counts"] = np.ones((3, 4))
    refused(folder, folder / "file.h5", says=("not an h5ad", "obs"))


def test_a_folder_that_is_no_zarr_store(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("hello")
    refused(folder, folder / "sub", says=("zarr",))


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_h5ad(folder: Path, screen_file: Path, share: float) -> None:
    content = screen_file.read_bytes()
    (folder / "cut.h5ad").write_bytes(content[: int(share * len(content))])
    refused(folder, folder / "cut.h5ad")


def test_damaged_matrix(folder: Path, screen: ad.AnnData) -> None:
    path = folder / "damaged.h5ad"
    screen.copy().write_h5ad(path, compression="gzip")
    with h5py.File(path) as handle:
        chunk = handle["X/data"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 20 : chunk.byte_offset + 200] = bytes(180)
    path.write_bytes(content)
    refused(folder, path, says=("cannot be read",))


def indices_beyond_the_genes(handle: h5py.File) -> None:
    handle["X/indices"][5] = 10_000


def no_matrix(handle: h5py.File) -> None:
    del handle["X"]


def matrix_of_another_shape(handle: h5py.File) -> None:
    del handle["X"]
    handle["X"] = np.ones((4, 40))


@pytest.mark.parametrize(
    ("change", "says"),
    [(indices_beyond_the_genes, "matrix"), (matrix_of_another_shape, "4 x 40"), (no_matrix, "no matrix X")],
)
def test_odd_matrix(folder: Path, screen_file: Path, change: Callable[[h5py.File], None], says: str) -> None:
    with edited(screen_file, folder / "odd.h5ad") as handle:
        change(handle)
    refused(folder, folder / "odd.h5ad", says=(says, *(["--layer"] if change is no_matrix else [])))


def test_empty_screen(folder: Path, write: Callable[[ad.AnnData], Path]) -> None:
    refused(folder, write(small_screen()[:0].copy()), says=("empty",))


def test_missing_layer(folder: Path, write: Callable[[ad.AnnData], Path]) -> None:
    adata = small_screen()
    adata.layers["counts"] = adata.X
    refused(folder, write(adata), "--layer", "count", says=("no layer 'count'", "'counts'"))


# --- labels


def test_no_such_column(folder: Path, screen_file: Path) -> None:
    refused(
        folder, screen_file, "--perturbation-key", "perturbations", says=("no column 'perturbations'", "'perturbation'")
    )


def test_no_such_batch_column(folder: Path, screen_file: Path) -> None:
    refused(folder, screen_file, "--batch-key", "batches", says=("batches", "'batch'"))


def test_no_control_cells(folder: Path, write: Callable[[ad.AnnData], Path]) -> None:
    adata = small_screen()
    adata = adata[adata.obs["perturbation"] != "control"].copy()
    refused(folder, write(adata), says=("perturbation",))
    refused(folder, write(adata), "--perturbation-key", "perturbation", says=("no control cells", "--control-label"))


def test_one_perturbation_only(folder: Path, write: Callable[[ad.AnnData], Path]) -> None:
    adata = small_screen()
    adata = adata[adata.obs["perturbation"].isin(["control", "g1"])].copy()
    refused(folder, write(adata), says=("'g1'", "two"))


def test_two_readings_of_labels(folder: Path, write: Callable[[ad.AnnData], Path]) -> None:
    adata = small_screen()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace({"g1": "g0_promoter"})
    refused(folder, write(adata), says=("combinations at '_' or as single perturbations", "--separator _ or"))


def test_too_few_cells(folder: Path, screen_file: Path) -> None:
    refused(folder, screen_file, "--min-cells", 1000, says=("--min-cells",))


@pytest.mark.parametrize("label", ["g0+g9", "control", "nothing"])
def test_unknown_hold_out(folder: Path, screen_file: Path, label: str) -> None:
    refused(folder, screen_file, "--hold-out", label, says=(label,))


def test_everything_held_out(folder: Path, screen_file: Path) -> None:
    labels = [word for i in range(7) for word in ("--hold-out", f"g{i}")]
    refused(folder, screen_file, "--no-combinations", *labels)


# --- values


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(
    folder: Path, write: Callable[[ad.AnnData], Path], value: float, sparse: bool
) -> None:
    adata = small_screen()
    x = dense(adata)
    x[17, 3] = value
    adata.X = sp.csr_matrix(x) if sparse else x
    refused(folder, write(adata), says=("'gene3'", f"{adata.obs_names[17]!r}", "Remove"))


def test_a_few_negative_values(folder: Path, write: Callable[[ad.AnnData], Path]) -> None:
    adata = small_screen()
    x = np.log1p(dense(adata))
    x[5, 5] = -0.5
    adata.X = x
    refused(folder, write(adata), says=("has negative values (1, ", "--values continuous"))


def test_all_zero(folder: Path, write: Callable[[ad.AnnData], Path]) -> None:
    adata = small_screen()
    adata.X = np.zeros(adata.shape)
    refused(folder, write(adata), says=("zero",))


def odd_integers(kind: str, x: np.ndarray) -> np.ndarray:
    """Whole numbers that are neither counts nor logarithms."""
    return {
        "binary": (x > np.median(x)).astype(float),
        "negative": x - 50,
        "ranks": np.argsort(np.argsort(x, axis=1), axis=1) + 1.0,
        "rounded logarithms": np.rint(np.log1p(x)) + 1,
    }[kind]


@pytest.mark.parametrize("kind", ["binary", "negative", "ranks", "rounded logarithms"])
def test_integers_that_are_no_counts(folder: Path, write: Callable[[ad.AnnData], Path], kind: str) -> None:
    adata = small_screen()
    adata.X = odd_integers(kind, dense(adata))
    refused(folder, write(adata), says=("log-normalised",))


def test_log_values_called_counts(folder: Path, write: Callable[[ad.AnnData], Path]) -> None:
    adata = small_screen()
    adata.X = np.log1p(dense(adata))
    refused(folder, write(adata), "--values", "counts", says=("does not hold counts", "logarithms"))


def test_normalised_values_without_the_logarithm(folder: Path, write: Callable[[ad.AnnData], Path]) -> None:
    adata = small_screen()
    adata.X = dense(adata) / dense(adata).sum(1, keepdims=True) * 1e4
    refused(folder, write(adata), says=("without the logarithm", "sc.pp.log1p"))


# --- names and genes


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "empty"),
        ("# a comment\n\n", "empty"),
        ("gene1\ngene_2\n", "'gene_2'"),
        ("gene1\ngene3\n", "'gene3' is zero"),
        ("gene1\n", "too few genes to fit: 1"),
    ],
)
def test_gene_lists(folder: Path, write: Callable[[ad.AnnData], Path], content: str, says: str) -> None:
    adata = small_screen()
    x = dense(adata)
    x[:, 3] = 0
    adata.X = x
    (folder / "genes.txt").write_text(content)
    refused(folder, write(adata), "--genes", folder / "genes.txt", says=(says,))


def test_gene_list_that_cannot_be_read(folder: Path, screen_file: Path) -> None:
    refused(folder, screen_file, "--genes", folder / "none.txt", says=("none.txt",))
    refused(folder, screen_file, "--genes", folder, says=("cannot be read",))
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00g")
    refused(folder, screen_file, "--genes", folder / "binary.txt", says=("cannot be read",))


@pytest.mark.parametrize("method", ["straighten", "linear", "gradient"])
def test_more_programs_than_perturbations(folder: Path, screen_file: Path, method: str) -> None:
    answer = invoke("fit", screen_file, "--output", folder.parent / "RUN", "--method", method, "--n-latents", 8)
    said = [line for line in answer.err.splitlines() if not line.startswith("• ")]
    check_refusal(answer.code, answer.out, "\n".join(said[-2:]), 3, "8 programs were asked for", "fewer programs")
    # All seven perturbations are fitted, six of them have an effect.
    assert ("only 7 perturbations" if method == "gradient" else "only 6 single perturbations") in answer.err
    assert files_below(folder.parent) == {"inputs"}


def test_more_programs_than_perturbations_with_an_effect(folder: Path, screen_file: Path) -> None:
    answer = invoke("fit", screen_file, "--output", folder.parent / "RUN", "--n-latents", 7)
    assert answer.code == 3 and files_below(folder.parent) == {"inputs"}
    assert "7 programs were asked for, but only 6 single perturbations have a detectable effect." in answer.err


# --- outputs


def test_output_exists(folder: Path, screen_file: Path) -> None:
    (folder.parent / "RUN").mkdir()
    refused(folder, screen_file, says=("exists", "--force"))


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_no_run_is_never_replaced(folder: Path, screen_file: Path, kind: str) -> None:
    target = folder.parent / "RUN"
    treasure = folder / "treasure"
    treasure.mkdir()
    (treasure / "thesis.txt").write_text("precious")
    if kind == "folder":
        shutil.copytree(treasure, target)
    elif kind == "file":
        target.write_text("precious")
    else:
        target.symlink_to(treasure)
    refused(folder, screen_file, "--force", says=("not a run of crlseq",))
    assert (target if kind == "file" else target / "thesis.txt").read_text() == "precious"


def test_a_foreign_partial_folder_is_left_alone(folder: Path, screen_file: Path) -> None:
    partial = folder.parent / "RUN.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("precious")
    for option in ([], ["--force"], ["--resume"]):
        refused(folder, screen_file, *option)
    assert (partial / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "place", ["inputs/file.txt/RUN", "/proc/crlseq-run", "/dev/null/RUN", "/", ".", "..", "x" * 300]
)
def test_unwritable_output(folder: Path, screen_file: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder / "file.txt").write_text("text")
    before = files_below(folder.parent)
    answer = invoke("fit", screen_file, "--output", place, "--epochs", 1)
    lines = [line for line in answer.err.splitlines() if not line.startswith(("• ", "  3 latents", "  6 latents"))]
    check_refusal(answer.code, answer.out, "\n".join(lines[-2:]), 3)
    assert files_below(folder.parent) == before


def test_cuda_absent(folder: Path, screen_file: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    refused(folder, screen_file, "--device", "cuda", says=("CUDA",))


@pytest.mark.parametrize(
    "words", ["inspect LONG", "report LONG", "plot LONG dag -o x.png", "check LONG", "prepare LONG -o s", "rerun RUN --data LONG", "report RUN --gene-sets LONG -o x.html", "fit SCREEN --gene-sets LONG -o x"]
)  # fmt: skip
def test_a_path_that_is_too_long_for_the_system(
    words: str, run_folder: Path, screen_file: Path, tmp_path: Path
) -> None:
    """Found by scripts/attack: whoever opens it, and not where the fit writes."""
    places = {"LONG": "a" * 5000, "RUN": str(run_folder), "SCREEN": str(screen_file), "x": str(tmp_path / "x"), "s": str(tmp_path / "s")}  # fmt: skip
    answer = invoke(*(places.get(word, word) for word in words.split()))
    check_refusal(*answer, 3, f"{'a' * 80}… cannot be used", "Give a shorter path")
    assert files_below(tmp_path) == set()


def test_codes_of_missing_values_among_counts(tmp_path: Path) -> None:
    """Found by scripts/attack: every seventh count is the largest whole number of 32 bits."""
    adata = small_screen()
    x = adata.X.toarray()
    x.flat[::7] = np.iinfo(np.int32).max
    adata.X = x
    adata.write_h5ad(tmp_path / "screen.h5ad")
    answer = invoke("fit", tmp_path / "screen.h5ad", "-o", tmp_path / "RUN", "--method", "linear", "--n-latents", 3, "--quiet")  # fmt: skip
    check_refusal(*answer, 3, "their components are not finite", "largest value")
    assert files_below(tmp_path) == {"screen.h5ad"}


def test_layers_that_are_none(tmp_path: Path) -> None:
    """Found by scripts/attack: numbers where layers should be."""
    small_screen().write_h5ad(tmp_path / "screen.h5ad")
    with h5py.File(tmp_path / "screen.h5ad", "r+") as handle:
        del handle["layers"]
        handle["layers"] = np.arange(3)
    check_refusal(*invoke("check", tmp_path / "screen.h5ad"), 3, "the list of layers cannot be read")

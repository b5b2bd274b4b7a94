"""Passes over cells on four processes of Dask, one of them killed meanwhile: what one process computes, to the bit."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from crlseq.data import cluster, dataset, matrix, storewriter
from crlseq.data.cluster import LostClusterError, mapped, on_cluster
from crlseq.data.prepare import prepare
from crlseq.data.store import MANIFEST, StoredMatrix, read_manifest, verify
from crlseq.data.storewriter import _ShardWriter
from crlseq.discovery import factor_model
from crlseq.errors import InputError
from crlseq.threads import in_order
from tests.support import check_refusal, files_of, invoke, small_screen

pytest.importorskip("distributed")
SMALL_BLOCKS = (
    (matrix, "BLOCK_VALUES", 2000), (dataset, "ROWS", 64), (factor_model, "CHUNK", 64),
    (storewriter, "CHUNK", 256), (storewriter, "SHARD", 1024), (storewriter, "BUCKET_VALUES", 4000),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in SMALL_BLOCKS:
        monkeypatch.setattr(module, name, value)


@pytest.fixture(scope="module")
def workers() -> Iterator[Any]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=4, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address=":0", silence_logs=50,
        scheduler_kwargs={"allowed_failures": 1},
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def store(screen_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """740 cells and 40 genes."""
    path = tmp_path_factory.mktemp("prepared") / "store"
    prepare([screen_file], path)
    return path


def killed_in(number: int, workers: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One worker is killed in that pass, once two of its blocks are done and others are under way; the killed."""
    killed, passes = list[int](), count()

    def killing(submit: Callable[[Any], Callable[[], Any]], items: Iterable[Any], ahead: int) -> Iterator[Any]:
        this = next(passes)
        for i, made in enumerate(in_order(submit, items, ahead)):
            if i == 1 and this == number:
                killed.append(next(iter(workers.workers.values())).pid)
                os.kill(killed[0], signal.SIGKILL)
            yield made

    monkeypatch.setattr(cluster, "in_order", killing)
    return killed


@pytest.fixture
def one_is_killed(workers: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In the first pass."""
    return killed_in(0, workers, monkeypatch)


def double(x: float) -> float:
    return 2 * x


def _read(writer: _ShardWriter, bucket: int, change: Callable[[Path], object]) -> Any:
    change(writer.buckets.folder / str(bucket))
    return READ(writer, bucket)


READ = _ShardWriter._read


def end(x: float) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(x: float) -> None:
    raise InputError(f"{x} is odd.", "Give an even number.")


def test_results_come_in_the_order_of_the_items(workers: Any) -> None:
    with on_cluster(workers.scheduler_address):
        assert not cluster.on_one_machine()
        assert [*mapped(double, range(100))] == [2 * i for i in range(100)]
        assert [*mapped(double, [])] == []
        with pytest.raises(InputError, match=r"1 is odd\. Give an even number\."):
            [*mapped(refuse, [1, 2])]
    assert cluster.on_one_machine()
    assert [*mapped(double, range(3))] == [0, 2, 4]


def test_a_fit_of_a_store_is_that_of_one_process(workers, store, one_is_killed, tmp_path) -> None:
    words = ["fit", store, "--method", "linear", "--n-latents", 3, "--bootstrap", 0, "--n-top-genes", 30, "--output"]
    alone = invoke(*words, tmp_path / "alone", "--streamed")
    assert alone.code == 0 and not one_is_killed, alone.err
    both = invoke(*words, tmp_path / "both", "--cluster", workers.scheduler_address)
    assert both.code == 0 and both.out == "" and one_is_killed, both.err
    tables = sorted(name for name in files_of(tmp_path / "alone") if name.endswith((".csv", ".graphml")))
    assert "effects.csv" in tables and "interventions.csv" in tables
    for name in (*tables, "model.safetensors"):
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    latents = [ad.read_h5ad(tmp_path / run / "crlseq.h5ad").obsm["X_crlseq"] for run in ("alone", "both")]
    assert np.array_equal(*latents)


@pytest.mark.parametrize("number", [0, 1], ids=["reading", "writing"])
def test_a_store_has_the_bytes_that_one_process_writes(number, workers, screen_file, tmp_path, monkeypatch) -> None:
    here = prepare([screen_file], tmp_path / "alone")
    assert len([name for name in here.files if name.startswith("X/data/c/")]) > 5
    killed, read_here = killed_in(number, workers, monkeypatch), list[int]()
    monkeypatch.setattr(storewriter.Buckets, "read", lambda buckets, bucket: read_here.append(bucket))
    answer = invoke("prepare", screen_file, "--output", tmp_path / "store", "--cluster", workers.scheduler_address)
    assert answer.code == 0 and killed and not read_here, answer.err
    assert read_manifest(tmp_path / "store") == here  # with the digests of all files
    verify(tmp_path / "store")
    written = {str(file.relative_to(tmp_path / "store")) for file in (tmp_path / "store").rglob("*") if file.is_file()}
    assert written == {*here.files, MANIFEST}


def test_workers_that_see_another_disk_are_told(screen_file, tmp_path, monkeypatch) -> None:
    """Of what a worker lacks, and of what it wrote where nobody else sees it."""
    write = _ShardWriter.write

    def elsewhere(writer: _ShardWriter, shards: Any) -> dict[str, str]:
        made = write(writer, shards)
        (writer.store / shards[0].names()[0]).unlink()
        return made

    monkeypatch.setattr(_ShardWriter, "write", elsewhere)
    with pytest.raises(InputError, match=r"do not see the same file .*X/indices/c/0\. .* or prepare without --cluster"):
        prepare([screen_file], tmp_path / "store")
    monkeypatch.setattr(_ShardWriter, "write", write)
    for change in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])):
        monkeypatch.setattr(_ShardWriter, "_read", lambda writer, bucket, change=change: _read(writer, bucket, change))
        with pytest.raises(InputError, match=r"do not see the same file .*buckets/0\."):
            prepare([screen_file], tmp_path / "store", force=True)


def test_what_a_killed_writer_left_is_no_part_of_the_store(screen_file, tmp_path, monkeypatch) -> None:
    expected = prepare([screen_file], tmp_path / "alone")
    write = _ShardWriter._write

    def killed(writer: _ShardWriter, shard: Any) -> None:
        if shard.number == 2:
            (writer.store / "X/data/c/2.0123456789abcdef.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        write(writer, shard)

    monkeypatch.setattr(_ShardWriter, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare([screen_file], tmp_path / "store")
    monkeypatch.setattr(_ShardWriter, "_write", write)
    assert prepare([screen_file], tmp_path / "store", resume=True) == expected


def test_a_shard_of_the_first_gene_alone_is_a_file(tmp_path) -> None:
    adata = small_screen()
    adata.X = sp.csr_matrix(
        (1.0 + np.arange(adata.n_obs) % 3, (np.arange(adata.n_obs), np.zeros(adata.n_obs, int))), adata.shape
    )
    adata.write_h5ad(tmp_path / "screen.h5ad")
    made = prepare([tmp_path / "screen.h5ad"], tmp_path / "store")
    assert {"X/indices/c/0", "X/data/c/0"} <= {*made.files}
    verify(tmp_path / "store")


def test_what_is_wrong_with_a_value_is_told_as_without_a_cluster(workers, tmp_path) -> None:
    adata = small_screen()
    adata.X = adata.X.astype(np.float32)
    adata.X[[100], [3]] = np.nan
    adata.write_h5ad(tmp_path / "screen.h5ad")
    answers = [
        invoke("prepare", tmp_path / "screen.h5ad", "--output", tmp_path / "store", "--force", *more)
        for more in ((), ("--cluster", workers.scheduler_address))
    ]
    assert answers[0].code == answers[1].code == 3
    assert answers[0].err == answers[1].err and "is nan." in answers[1].err


def test_workers_need_the_same_store_and_file(workers, store, screen_file, tmp_path) -> None:
    opened, (path, digest) = StoredMatrix(store).__reduce__()
    assert (opened(path, digest)[:9] != StoredMatrix(store)[:9]).nnz == 0
    with pytest.raises(InputError, match="A worker finds no store at"):
        opened(tmp_path, digest)
    with pytest.raises(InputError, match="or another one"):
        opened(path, "other")
    with matrix.open_screen(screen_file) as screen:
        again = pickle.loads(pickle.dumps(screen.reader))
        assert (again[5:9] != screen.reader[5:9]).nnz == 0
        opened, (path, layer, (size, changed)) = screen.reader.__reduce__()
    with pytest.raises(InputError, match="is another file on a worker"):
        opened(path, layer, (size + 1, changed))


def test_a_block_that_ends_its_workers_ends_the_work(workers: Any) -> None:
    with (
        on_cluster(workers.scheduler_address),
        pytest.raises(LostClusterError, match="Worker after worker"),
    ):
        [*mapped(end, [0])]
    assert LostClusterError("").exit_code == 130


def test_a_cluster_that_goes_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0", silence_logs=50) as running,
        on_cluster(running.scheduler_address),
    ):
        assert [*mapped(double, [1, 2])] == [2, 4]
        running.scale(0)
        running.sync(running._correct_state)
        with pytest.raises(LostClusterError, match="The cluster was lost"):
            [*mapped(double, [1, 2])]
    with LocalCluster(n_workers=0, processes=False, dashboard_address=":0", silence_logs=50) as running:
        monkeypatch.setattr(cluster, "ANSWER", 0.5)
        with pytest.raises(InputError, match="has no workers"), on_cluster(running.scheduler_address):
            pass


@pytest.mark.parametrize(
    ("where", "code", "says"),
    [
        ("tcp://127.0.0.1:1", 3, "No Dask scheduler answers at tcp://127.0.0.1:1."),
        ("tcp://127.0.0.1", 3, "No Dask scheduler answers"),
        ("elsewhere", 2, "'elsewhere' is neither the address of a Dask scheduler nor a number of processes."),
        ("0", 2, "0 processes cannot be started."),
    ],
)
def test_an_address_where_nobody_answers_is_told(store, tmp_path, monkeypatch, where, code, says) -> None:
    monkeypatch.setattr(cluster, "ANSWER", 0.5)
    for words in (("fit", store), ("prepare", store)):
        answer = invoke(*words, "--output", tmp_path / "OUT", "--cluster", where)
        check_refusal(answer.code, answer.out, answer.err, code, says)
    assert not any(tmp_path.iterdir())


def test_a_cluster_is_refused_for_what_it_cannot_read(store, screen_file, tmp_path, monkeypatch) -> None:
    answer = invoke("fit", screen_file, "--output", tmp_path / "RUN", "--cluster", "2")
    check_refusal(answer.code, answer.out, answer.err, 3, "A cluster needs a prepared store.", "crlseq prepare")
    answer = invoke("fit", store, "--output", tmp_path / "RUN", "--in-memory", "--cluster", "2")
    check_refusal(answer.code, answer.out, answer.err, 2, "A cluster reads a store piece by piece.", "--in-memory")
    monkeypatch.setitem(sys.modules, "distributed", None)
    answer = invoke("fit", store, "--output", tmp_path / "RUN", "--cluster", "2")
    check_refusal(answer.code, answer.out, answer.err, 2, "--cluster needs distributed", "'.[cluster]'")

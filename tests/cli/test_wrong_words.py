"""Words in the wrong place, and names that are not there: what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from crlseq.errors import nearest, suggestion
from crlseq.run.run import Run
from tests.support import check_refusal, invoke


def test_the_nearest_names_come_first_whatever_their_case() -> None:
    assert nearest("stat2", ["IRF1", "STAT1", "STAT2"]) == ["STAT2", "STAT1"]
    assert nearest("zzz", ["IRF1", "STAT1"]) == []
    assert nearest("a", []) == []
    assert suggestion("sat1", ["IRF1", "STAT1"], "Genes are") == "Did you mean 'STAT1'?"
    assert suggestion("zzz", ["IRF1", "STAT1"], "Genes are") == "Genes are IRF1, STAT1."


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        ("plot dag RUN", 2, "Write: crlseq plot RUN dag."),
        ("plot dag RUN --output dag.png", 2, "Write: crlseq plot RUN dag."),
        ("inspect program P1 RUN", 2, "Write: crlseq inspect program RUN P1."),
        ("inspect RUN programs", 2, "Write: crlseq inspect programs RUN."),
        ("inspect programz RUN", 2, "Did you mean 'program' or 'programs'?"),
        ("inspect .", 3, "Runs in .: RUN."),
        ("inspect RUM", 3, "Did you mean RUN?"),
        ("inspect elsewhere", 3, "Runs in .: RUN."),
        ("inspect RUN/programs.csv", 3, "Name the run itself: RUN."),
        ("inspect screen.h5ad", 3, "`crlseq fit screen.h5ad` makes a run of it."),
        ("check RUN", 3, "`crlseq inspect RUN` shows it. Its screen is RUN/crlseq.h5ad."),
        ("fit RUN", 3, "`crlseq inspect RUN` shows it. Its screen is RUN/crlseq.h5ad."),
        ("inspect program RUN g0", 3, "g0 is a perturbation of P"),
        ("inspect program RUN gene1", 3, "gene1 is a gene with its largest loadings in P"),
        ("inspect program RUN p1", 3, "Did you mean 'P1'"),
        ("inspect programs RUN --program P7", 3, "Programs are P0 to P2."),
        ("inspect program RUN P9", 3, "Programs are P0 to P2."),
        ("plot RUN dgg --output x.png", 2, "Did you mean 'dag'?"),
        ("plot RUN embedding --perturbation G0 --output x.png", 3, "Did you mean 'g0'"),
        ("predict RUN --perturbation g00 --output x.h5ad", 3, "Did you mean 'g0'"),
        ("export RUN --format h5ads --output x", 2, "Did you mean 'h5ad'"),
        ("fit screen.h5ad --preset papr", 2, "Did you mean 'paper'?"),
        ("benchmark --scenario tooy --output x", 2, "Did you mean 'toy'?"),
        ("benchmark --method linaer --output x", 2, "Did you mean 'linear'?"),
    ],
)
def test_what_to_write_instead(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, code: int, hint: str
) -> None:
    (tmp_path / "RUN").symlink_to(run_folder)
    monkeypatch.chdir(tmp_path)
    check_refusal(*invoke(*words.split()), code, hint)
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]


def test_several_screens_are_for_prepare() -> None:
    answer = invoke("fit", "a.h5ad", "b.h5ad")
    assert (answer.code, answer.out) == (2, "")
    assert (
        answer.err.splitlines()[-1]
        == "A fit takes one screen. `crlseq prepare FILES --output STORE` makes one of several."
    )


def test_a_gene_in_place_of_a_program_names_those_with_its_largest_loadings(finished: Run, run_folder: Path) -> None:
    own = finished.programs[finished.programs["gene"] == "gene1"]
    order = own.loc[own["loading"].abs().sort_values(ascending=False).index[:3]]
    told = ", ".join(f"{row['program']} ({row['loading']:+.2f})" for row in order.to_dict("records"))
    assert (
        f"  gene1 is a gene with its largest loadings in {told}."
        in invoke("inspect", "program", run_folder, "gene1").err
    )

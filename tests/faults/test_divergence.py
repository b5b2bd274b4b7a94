"""Losses that explode, through the command line: done again with smaller steps, or given up with the history kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import crlseq
from crlseq.storage.checkpoint import load_checkpoint
from crlseq.training.learner import MAX_SLOWER
from crlseq.training.objective import Objective, Step
from tests.support import Answer, clear_screen, invoke, succeeds

AGAIN = "The loss is not finite in epoch {}; it is repeated with a quarter of the learning rate."


def fit(screen_file: Path, folder: Path, epochs: int, **training: float) -> Answer:
    options = "\n".join(f"{name} = {value}" for name, value in training.items())
    (folder / "options.toml").write_text(f"[training]\n{options}\n")
    words = ["--config", folder / "options.toml", "--method", "gradient", "--n-latents", 2, "--epochs", epochs]
    return invoke("fit", screen_file, "--output", folder / "RUN", *words)


def check_finite(folder: Path) -> crlseq.Run:
    run = crlseq.load(folder)
    assert np.isfinite(run.history.to_numpy()).all()
    assert np.isfinite(run.programs[["loading", "total_effect"]].to_numpy()).all()
    with_effect = run.interventions[run.interventions["perturbation"] != "g6"]
    assert np.isfinite(with_effect[["weight", "shift", "retention", "noise_scale"]].to_numpy()).all()
    assert all(bool(value.isfinite().all()) for value in load_file(folder / "model.safetensors").values())
    return run


def check_given_up(answer: Answer, folder: Path, epochs_done: int) -> None:
    """Exit code 4, one sentence and a hint, and a checkpoint of the last good epoch."""
    assert answer.code == 4, answer.err
    retries = [line.strip() for line in answer.err.splitlines() if "repeated with" in line]
    assert retries == [AGAIN.format(epochs_done + 1)] * MAX_SLOWER
    message, hint = answer.err.splitlines()[-2:]
    assert message == (
        f"crlseq: The loss is not finite in epoch {epochs_done + 1}, even with a learning rate 1024 times smaller."
    )
    assert hint == "  Lower the learning rate, or look for extreme values in the file."
    assert not (folder / "RUN").exists()
    learner = load_checkpoint(folder / "RUN.partial" / "resume.pt")["learners"][0]
    assert [record["epoch"] for record in learner["history"]] == list(range(epochs_done))
    assert all(bool(value.isfinite().all()) for value in learner["model"].values())


@pytest.mark.parametrize("clipping", [10.0, 1e30])
def test_a_learning_rate_of_a_thousand_is_hopeless(screen_file: Path, tmp_path: Path, clipping: float) -> None:
    answer = fit(screen_file, tmp_path, 2, learning_rate=1e3, gradient_norm=clipping)
    check_given_up(answer, tmp_path, 0)


def test_a_learning_rate_that_is_too_large_is_lowered(screen_file: Path, tmp_path: Path) -> None:
    answer = fit(screen_file, tmp_path, 2, learning_rate=30.0)
    assert answer.code == 0, answer.err
    assert 1 <= answer.err.count("repeated with a quarter") <= MAX_SLOWER
    run = check_finite(tmp_path / "RUN")
    assert run.info["notes"][-1].startswith("The loss is not finite in epoch")


def test_gradients_that_explode_once(screen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second step of the second epoch, of which nothing is left."""
    step, taken = torch.optim.Adam.step, list[int]()

    def exploding(self: torch.optim.Adam) -> None:
        taken.append(1)
        if len(taken) == 2 + len(taken[:taken_in_epoch]):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.fill_(float("inf"))
        step(self)

    taken_in_epoch = 2
    monkeypatch.setattr(torch.optim.Adam, "step", exploding)
    answer = fit(screen_file, tmp_path, 3)
    assert answer.code == 0, answer.err
    assert answer.err.count("repeated with") == 1
    run = check_finite(tmp_path / "RUN")
    assert run.history["epoch"].tolist() == [0, 1, 2]
    assert run.info["training"]["epochs_run"] == 3


def losses(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int], float]) -> None:
    """Adds ``spoil(n)`` to a term in the n-th training pass."""
    call, passes = Objective.__call__, list[int]()

    def spoiled(self: Objective, step: Step, generator: torch.Generator) -> dict[str, torch.Tensor]:
        terms = call(self, step, generator)
        if torch.is_grad_enabled():
            passes.append(1)
            terms["kl"] = terms["kl"] + spoil(len(passes))
        return terms

    monkeypatch.setattr(Objective, "__call__", spoiled)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e13])
def test_a_loss_that_is_no_number_once(
    screen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    losses(monkeypatch, lambda n: value if n == 3 else 0.0)
    answer = fit(screen_file, tmp_path, 2)
    assert answer.code == 0, answer.err
    assert answer.err.count("repeated with") == 1
    check_finite(tmp_path / "RUN")


def test_a_loss_that_stays_no_number(screen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_in_epoch = 2
    losses(monkeypatch, lambda n: float("nan") if n > 2 * steps_in_epoch else 0.0)
    check_given_up(fit(screen_file, tmp_path, 4), tmp_path, 2)


@pytest.mark.parametrize("method", ["linear", "gradient"])
def test_a_perturbation_whose_cells_are_all_the_same(tmp_path: Path, method: str) -> None:
    adata = clear_screen()
    cells = np.flatnonzero(adata.obs["perturbation"] == "g2")
    x = adata.X.tolil()
    x[cells] = x[cells[0]].toarray()
    adata.X = x.tocsr()
    adata.write_h5ad(tmp_path / "screen.h5ad")
    words = ["--method", method, "--n-latents", 3, "--epochs", 2, "--bootstrap", 2]
    succeeds("fit", tmp_path / "screen.h5ad", "--output", tmp_path / "RUN", *words)
    run = check_finite(tmp_path / "RUN")
    assert (run.interventions["perturbation"] == "g2").sum() == 1
    assert np.isfinite(run.evaluation[["mmd2", "l2", "pearson_delta"]].to_numpy()).all()

"""Training on small simulated screens: what is learned, what is kept, and going on after a stop."""

import numpy as np
import pytest
import torch

from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.dataset import read_data
from crlseq.data.simulate import simulate
from crlseq.errors import ConvergenceError, InputError
from crlseq.threads import on_threads
from crlseq.training import trainer
from crlseq.training.device import resolve_device
from crlseq.training.schedules import resolve_epochs, resolve_step
from crlseq.training.trainer import fit_model


@pytest.fixture(scope="module")
def data():
    screen = simulate(
        n_latents=3, perturbations_per_latent=2, n_genes=30, cells_per_perturbation=60, n_control=200,
        noise="gaussian", n_doubles=2, seed=3,
    )  # fmt: skip
    return read_data(screen, make_config().data, 0)


def same_weights(a, b):
    a, b = a.model.state_dict(), b.model.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_fit_explains_held_out_effects(data):
    fitted = fit_model(data, make_config(epochs=150, learning_rate=1e-2), 3)
    first, best = fitted.history[0], fitted.history[fitted.best_epoch]
    assert best["validation_mmd"] < 0.3 * first["validation_mmd"]
    assert best["validation_reconstruction"] < first["validation_reconstruction"]


def test_kept_weights_have_the_lowest_validation_loss_of_the_settled_epochs(data):
    fitted = fit_model(data, make_config(epochs=20, learning_rate=0.03), 3)
    settled = {int(r["epoch"]): r["validation_total"] for r in fitted.history if r["epoch"] >= 4}
    assert fitted.best_epoch == min(settled, key=settled.__getitem__)
    # and they are that epoch's, not the last: the same fit cut there ends with them
    assert fitted.best_epoch < 19


def test_early_stopping_goes_by_validation(data):
    fitted = fit_model(data, make_config(epochs=50, learning_rate=0.05, patience=0.06), 3)
    assert fitted.stopped_early
    assert len(fitted.history) == fitted.best_epoch + 1 + 3


def test_one_seed_one_result(data):
    config = make_config(epochs=2, seed=5)
    assert same_weights(fit_model(data, config, 3), fit_model(data, config, 3))
    assert not same_weights(fit_model(data, config, 3), fit_model(data, make_config(epochs=2, seed=6), 3))


class StopError(Exception):
    pass


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_stopped_fit_goes_on_to_the_same_weights(data, tmp_path, monkeypatch, preset):
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    config = make_config(preset, epochs=6)
    whole = fit_model(data, config, 3)

    def stop(record, n_epochs):
        if record["epoch"] == 3:  # after this epoch's steps and before its checkpoint
            raise StopError

    with pytest.raises(StopError):
        fit_model(data, config, 3, tmp_path / "resume.pt", "id", stop)
    seen = []
    resumed = fit_model(data, config, 3, tmp_path / "resume.pt", "id", lambda record, n: seen.append(record["epoch"]))
    assert seen == [0, 1, 2, 3, 4, 5]
    assert resumed.history == whole.history
    assert resumed.best_epoch == whole.best_epoch
    assert same_weights(whole, resumed)


@pytest.mark.parametrize("options", [{"epochs": 4}, {"epochs": 50, "learning_rate": 0.05, "patience": 0.06}])
def test_a_fit_killed_after_its_last_epoch_does_not_train_on(data, tmp_path, monkeypatch, options):
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    config = make_config(**options)
    whole = fit_model(data, config, 3, tmp_path / "resume.pt", "id")
    again = fit_model(data, config, 3, tmp_path / "resume.pt", "id")
    assert again.history == whole.history
    assert (again.best_epoch, again.stopped_early) == (whole.best_epoch, whole.stopped_early)
    assert same_weights(whole, again)


def test_a_checkpoint_of_another_fit_is_refused(data, tmp_path):
    fit_model(data, make_config(epochs=1), 3, tmp_path / "resume.pt", "one")
    with pytest.raises(InputError, match="other options"):
        fit_model(data, make_config(epochs=1), 3, tmp_path / "resume.pt", "two")


def test_a_damaged_checkpoint_is_one_sentence(data, tmp_path):
    (tmp_path / "resume.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="cannot be read"):
        fit_model(data, make_config(epochs=1), 3, tmp_path / "resume.pt", "id")


def test_a_loss_without_end_is_reported(data):
    with pytest.raises(ConvergenceError, match="not finite in epoch"):
        fit_model(data, make_config(epochs=20, learning_rate=1e6, gradient_norm=None), 3)


@pytest.mark.parametrize(
    "options",
    [
        {"causal_layer": False},
        {"mmd_weight": 0.0},
        {"intervention": "hard"},
        {"equations": "nonlinear"},
        {"preset": "paper"},
        {"dtype": "float64"},
        {"batch_size": 7, "perturbations_per_step": 3},
    ],
)
def test_every_configuration_is_one_code_path(data, options):
    fitted = fit_model(data, make_config(epochs=1, **options), 3)
    assert np.isfinite(list(fitted.history[0].values())).all()


def test_without_validation_cells_the_last_weights_are_kept(data):
    from dataclasses import replace

    split = np.where(data.split == splits.VALIDATION, splits.UNUSED, data.split)
    fitted = fit_model(replace(data, split=split), make_config(epochs=3), 3)
    assert fitted.best_epoch == 2
    assert "validation_total" not in fitted.history[0]


def test_a_small_screen_gets_more_epochs():
    cells = [np.arange(100), *[np.arange(64)] * 16]  # 16 pieces of 64: two steps an epoch
    assert resolve_epochs(make_config().training, cells) == 1000
    assert resolve_epochs(make_config().training, cells[:1] + cells[1:] * 100) == 100
    assert resolve_epochs(make_config(epochs=7).training, cells) == 7


def test_a_large_screen_gets_more_perturbations_a_step():
    training = make_config().training
    few, many, most = ([np.arange(100), *[np.arange(64)] * n] for n in (16, 1000, 10_000))
    assert [resolve_step(training, cells) for cells in (few, many, most)] == [8, 50, 64]
    assert resolve_epochs(training, many) == 100  # of 40 steps each
    assert resolve_step(make_config(perturbations_per_step=3).training, most) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_refused():
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(InputError, match="no CUDA device"):
        resolve_device("cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_follows_the_cpu(data):
    cpu, cuda = (fit_model(data, make_config(epochs=3, dtype="float64", device=d), 3) for d in ("cpu", "cuda"))
    assert abs(cpu.history[0]["reconstruction"] - cuda.history[0]["reconstruction"]) < 0.1


def trained(fitted):
    """Models by seed, without what is measured of the kept one alone."""
    models = list(fitted.others)
    models.insert(fitted.seed, fitted.model)
    return [{name: value for name, value in model.state_dict().items() if "." in name} for model in models]


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_ensemble_trains_each_seed_as_if_it_were_alone(data, threads):
    config = make_config(epochs=3, ensemble=3)
    with on_threads(threads):
        together = fit_model(data, config, 3)
    models = trained(together)
    assert equal(models[0], trained(fit_model(data, make_config(epochs=3), 3))[0])
    assert not equal(models[0], models[1]) and not equal(models[1], models[2])
    assert together.history[together.best_epoch]["validation_total"] == min(
        record["validation_total"] for record in together.history if record["epoch"] >= 1
    )


def test_the_seed_that_validates_best_is_kept(data):
    losses = {}
    for n in (1, 2, 3, 4):
        fitted = fit_model(data, make_config(epochs=3, ensemble=n), 3)
        losses[n] = fitted.history[fitted.best_epoch]["validation_total"]
        assert 0 <= fitted.seed < n and len(fitted.others) == n - 1
        assert len(fitted.seed_losses) == n and min(fitted.seed_losses) == losses[n] == fitted.seed_losses[fitted.seed]
    # One more seed is kept if it is better, and changes nothing if it is not.
    assert losses[1] >= losses[2] >= losses[3] >= losses[4]
    assert losses[4] < losses[1]


def test_a_stopped_ensemble_goes_on_to_the_same_models(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    config = make_config(epochs=4, ensemble=2)

    def stop(record, n_epochs):
        if record["epoch"] == 2:
            raise StopError

    with pytest.raises(StopError):
        fit_model(data, config, 3, tmp_path / "resume.pt", "id", stop)
    resumed, whole = fit_model(data, config, 3, tmp_path / "resume.pt", "id"), fit_model(data, config, 3)
    assert all(equal(a, b) for a, b in zip(trained(resumed), trained(whole), strict=True))

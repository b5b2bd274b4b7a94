"""Programs, interventions and DAG in users' units: Jacobians by finite differences, scales, signs, verdicts."""

import numpy as np
import pytest
import torch

from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.dataset import read_data
from crlseq.data.simulate import simulate
from crlseq.discovery.verdict import judge_gradient
from crlseq.evaluation.held_out import abducted, evaluate_held_out
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.readout.programs import DECLARED_WEIGHT, encode, find_dag, find_interventions, find_programs


@pytest.fixture(scope="module")
def data():
    screen = simulate(
        n_latents=3, perturbations_per_latent=2, n_genes=20, cells_per_perturbation=40, n_control=150,
        noise="gaussian", seed=1,
    )  # fmt: skip
    return read_data(screen, make_config(hold_out_cells=0.2).data, 0)


@pytest.fixture(scope="module", params=["linear", "nonlinear"])
def model(data, request):
    torch.manual_seed(0)
    model = DiscrepancyVAE(20, 3, 6, n_hidden=8, equations=request.param).double()
    with torch.no_grad():
        model.scm.graph.normal_()
        model.scm.shift.normal_()
        model.intervention_encoder.embedding.normal_(std=5)
    return model.eval()


def test_loadings_and_total_effects_by_finite_differences(model, data):
    programs = find_programs(model, data, known_targets=False)
    controls = data.cells(0, splits.TRAIN, splits.VALIDATION)
    raw = encode(model, data, controls)
    assert np.abs(programs.scale) == pytest.approx(raw.std(0))
    assert programs.center == pytest.approx(raw.mean(0))
    u, step = torch.tensor(raw), 1e-6
    z = model.scm.abduct(u).detach()
    for k in range(3):
        e = step * torch.eye(3).double()[k]
        with torch.no_grad():
            direct = (model.decoder(u + e) - model.decoder(u - e)).mean(0).numpy() / (2 * step)
            total = (model.decoder(model.scm(z + e)) - model.decoder(model.scm(z - e))).mean(0).numpy() / (2 * step)
        assert programs.loading[k] == pytest.approx(direct * programs.scale[k], abs=1e-5)
        assert programs.total_effect[k] == pytest.approx(total * programs.scale[k], abs=1e-5)


def targeted(data, own_genes=(), seed=0):
    """A linear model 0 -> 1 whose six perturbations target 0, 0, 1, 1, 2, 2, with effects past the latents."""
    torch.manual_seed(seed)
    model = DiscrepancyVAE(20, 3, 6, n_hidden=8).double()
    with torch.no_grad():
        model.scm.graph.zero_()[0, 1] = 0.5
        model.scm.shift.copy_(torch.tensor([2.0, -1.0, 1.5, 3.0, 1.0, 2.0]))
        model.intervention_encoder.given.copy_(torch.eye(3).repeat_interleave(2, 0))
        model.intervention_encoder.is_given.fill_(True)
        model.residual.normal_(std=0.3)
    return model.eval()


def test_total_effects_are_what_perturbations_do(data):
    model = targeted(data)
    programs = find_programs(model, data)
    # u1 = 0.5 z0 + z1 has the variance 1.25; the others 1.
    assert np.abs(programs.scale) == pytest.approx([1, np.sqrt(1.25), 1])
    found = find_interventions(model, programs)
    controls = data.cells(0, splits.TRAIN, splits.VALIDATION)
    with torch.no_grad():
        z = model.scm.abduct(torch.tensor(encode(model, data, controls)))
        effects = np.stack([model.mean_effect(z, [k]).numpy() for k in range(6)])
    for program, pair in enumerate(((0, 1), (2, 3), (4, 5))):
        own = list(pair)
        a, n = found.shift[own], np.array([len(data.cells(1 + k, splits.TRAIN)) for k in own])
        fitted = (n * a) @ effects[own] / (n * a**2).sum()
        assert programs.total_effect[program] == pytest.approx(fitted, abs=2e-2)
    weight = 0.5 * programs.scale[0] / programs.scale[1]
    assert programs.loading[0] == pytest.approx(programs.total_effect[0] - weight * programs.total_effect[1])
    assert programs.loading[2] == pytest.approx(programs.total_effect[2])


def test_a_gene_is_read_without_the_perturbations_that_target_it(data, monkeypatch):
    model = targeted(data)
    plain = find_programs(model, data)
    monkeypatch.setitem(data.__dict__, "own_genes", ((5,), (), (7,), (7,), (), ()))
    found = find_programs(model, data)
    size = np.abs(found.scale[0])
    with torch.no_grad():
        controls = data.cells(0, splits.TRAIN, splits.VALIDATION)
        z = model.scm.abduct(torch.tensor(encode(model, data, controls)))
        alone = model.mean_effect(z, [1]).numpy() / -1.0 * size * np.sign(found.scale[0])
    assert found.total_effect[0, 5] == pytest.approx(alone[5], abs=2e-2)  # of perturbation 1 alone
    assert np.isnan(found.total_effect[1, 7]) and np.isnan(found.loading[1, 7])
    rest = np.delete(np.arange(20), 7)
    signs = np.sign(found.scale * plain.scale)[:, None]
    changed = ~np.isclose(found.total_effect * signs, plain.total_effect)
    assert set(map(tuple, np.argwhere(changed))) == {(0, 5), (1, 7)}
    assert not np.isnan(found.loading[:, rest]).any()


def test_total_effect_of_a_program_without_children_is_its_loading(model, data):
    programs = find_programs(model, data)
    assert programs.total_effect[2] == pytest.approx(programs.loading[2])
    assert programs.total_effect[0] != pytest.approx(programs.loading[0])


def test_most_of_each_programs_loading_is_positive(model, data):
    loading = find_programs(model, data).loading
    assert ((loading * np.abs(loading)).sum(1) >= 0).all()


def test_shifts_are_in_standard_deviations_of_the_target(model, data):
    programs = find_programs(model, data)
    found = find_interventions(model, programs)
    assert np.allclose(found.weight.sum(1), 1)
    for k in range(6):
        target = found.weight[k].argmax()
        assert found.target[k] == target
        raw = found.weight[k, target] * model.scm.shift[k].item()
        assert found.shift[k] == pytest.approx(raw / programs.scale[target])


def test_standardised_weights_do_not_depend_on_the_units_of_the_latents(data):
    torch.manual_seed(0)
    model = DiscrepancyVAE(20, 3, 6, n_hidden=8).double()
    programs = find_programs(model, data, known_targets=False)
    dag = find_dag(model, programs, make_config(method="gradient").model)
    assert not find_dag(model, programs, make_config().model).declared.any()  # a likelihood found nothing to go by
    raw, sd = (
        model.scm.adjacency.detach().numpy(),
        encode(model, data, data.cells(0, splits.TRAIN, splits.VALIDATION)).std(0),
    )
    assert np.abs(dag.weights) == pytest.approx(np.abs(raw) * sd[:, None] / sd[None, :])
    assert (dag.declared == (np.abs(dag.weights) >= DECLARED_WEIGHT)).all()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"preset": "paper"}, "absorb any graph"),
        ({"causal_layer": False}, "no graph"),
        ({"method": "gradient"}, "single fit"),
        ({}, "No single perturbation has a detectable effect"),
    ],
)
def test_the_verdict_gives_its_reason(options, word):
    found = judge_gradient(make_config(**options).model)
    assert found.answer == "not identified"
    assert word in found.reason


def test_a_linear_layer_with_shifts_has_the_same_fit_without_a_graph():
    """The claim behind the verdict on the preset `paper` (a network decoder can absorb any graph, so that the likelihood does not prefer the true one)."""
    torch.manual_seed(0)
    model = DiscrepancyVAE(9, 4, 3, n_hidden=6, intervention="shift", noise="none").double()
    x, perturbations = torch.randn(3, 5, 9).double(), torch.tensor([[0], [1], [2]])
    with torch.no_grad():
        before = model(x, perturbations)
        total = torch.linalg.inv(torch.eye(4).double() - model.scm.adjacency)
        model.decoder.hidden.weight.copy_(model.decoder.hidden.weight @ total.T)
        model.scm.graph.zero_()
        after = model(x, perturbations)
    assert torch.allclose(before.virtual, after.virtual)
    assert torch.allclose(before.reconstruction, after.reconstruction)
    assert torch.equal(before.mean, after.mean)


def test_evaluation_uses_held_out_cells_and_real_controls(data):
    torch.manual_seed(0)
    model = DiscrepancyVAE(20, 3, 6, n_hidden=8, intervention="shift").double().eval()
    with torch.no_grad():
        model.scm.shift.zero_()  # virtual cells are their controls, so every comparison is with "no change"
    table = evaluate_held_out(model, data, 0)
    assert list(table["condition"]) == list(data.condition_names[1:])
    assert (table["split"] == "test").all()
    assert (table["n_cells"] == 8).all()
    assert table["mmd2"].to_numpy() == pytest.approx(table["mmd2_no_change"].to_numpy())
    assert table["l2"].to_numpy() == pytest.approx(table["l2_no_change"].to_numpy(), abs=1e-6)


def test_to_decode_cells_afresh_is_no_effect(data):
    """Without noise that is abducted: what the model makes of cells without shifts is far from them, and no change."""
    torch.manual_seed(0)
    model = DiscrepancyVAE(20, 3, 6, n_hidden=8, intervention="shift", noise="none").double().eval()
    with torch.no_grad():
        model.scm.shift.zero_()
    table = evaluate_held_out(model, data, 0)
    assert table["l2"].to_numpy() == pytest.approx(table["l2_no_change"].to_numpy(), abs=1e-6)
    assert (table["mmd2"] > table["mmd2_no_change"]).all()


def test_virtual_cells_of_a_known_shift():
    torch.manual_seed(0)
    model = DiscrepancyVAE(4, 2, 1, n_hidden=3, intervention="shift").double().eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
        model.scm.graph.zero_()
        # Positive hidden units: the decoder is u_0 + 10 on the first gene alone.
        model.decoder.hidden.weight[0, 0] = 1
        model.decoder.hidden.bias[0] = 10
        model.decoder.output.weight[0, 0] = 1
        model.scm.shift.fill_(3.0)
        model.intervention_encoder.logits.weight.zero_()
        model.intervention_encoder.logits.bias.copy_(torch.tensor([50.0, 0.0]))
    control = np.arange(12.0).reshape(3, 4)
    expected = control + np.array([3.0, 0, 0, 0])
    for found in abducted(model, control, 0)(np.array([0])):
        assert found == pytest.approx(expected, abs=1e-6)
    model.penetrance.fill_(0.25)
    control = np.tile(control, (1000, 1))
    act = abducted(model, control, 0)
    virtual, mean = act(np.array([0]))
    assert act.mean(np.array([0])) == pytest.approx(mean.mean(0), abs=1e-9)
    assert np.array_equal(act.some(np.array([5, 2]))(np.array([0]))[0], virtual[[5, 2]])
    assert (mean - control)[:, 0] == pytest.approx(0.75, abs=1e-6)
    moved = (virtual - control)[:, 0]
    assert np.allclose(moved[moved > 1], 3) and np.allclose(moved[moved < 1], 0)
    assert (moved > 1).mean() == pytest.approx(0.25, abs=0.03)


def test_evaluation_has_the_training_effects_beside_the_model(data):
    table = evaluate_held_out(DiscrepancyVAE(20, 3, 6, n_hidden=8).double().eval(), data, 0).set_index("condition")
    control = data.cells(0, splits.TRAIN)
    effects = {
        name: data.dense(data.cells(c, splits.TRAIN)).mean(0, dtype=float) - data.dense(control).mean(0, dtype=float)
        for c, name in enumerate(data.condition_names)
        if c
    }
    average = np.mean(list(effects.values()), axis=0)
    start = data.dense(data.cells(0, splits.TRAIN, splits.VALIDATION, splits.TEST)).mean(0, dtype=float)
    for c, name in enumerate(data.condition_names[1:], 1):
        measured = data.dense(data.cells(c, splits.TEST)).mean(0, dtype=float)
        for ending, effect in (("training", effects[name]), ("mean", average)):
            assert table.loc[name, f"l2_{ending}"] == pytest.approx(np.linalg.norm(start + effect - measured), rel=1e-4)
            expected = np.corrcoef(effect, measured - start)[0, 1]
            assert table.loc[name, f"pearson_delta_{ending}"] == pytest.approx(expected, abs=1e-4)

"""Where an encoder of gene sets starts: read-outs of a known truth, and the sets that carry a program come first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.genesets import GeneSets
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.readout.pathways import pathway_table
from crlseq.readout.programs import find_programs
from crlseq.training.warm_start import start_from_sets
from tests.support import small_screen

P, SIZE, LOST = 3, 10, 0
G = 120
# Program k moves genes 10 k to 10 k + 9, the first five up and the others down; the rest is noise.
OWN = [range(SIZE * k, SIZE * (k + 1)) for k in range(P)]


@pytest.fixture(scope="module")
def sparse() -> tuple[PerturbSeqData, np.ndarray, np.ndarray]:
    """Values of 120 genes that follow three latents, ten genes each; training cells, and their latents."""
    adata = small_screen(n_genes=G)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(adata.n_obs, P))
    loading = np.zeros((P, adata.n_vars))
    for k, own in enumerate(OWN):
        loading[k, own] = np.repeat([1.0, -1.0], SIZE // 2)
    adata.X = z @ loading + 0.5 * rng.normal(size=adata.shape) + 20
    data = read_data(adata, make_config(values="continuous").data, 0)
    cells = np.flatnonzero(data.split == splits.TRAIN)
    return data, cells, z[cells]


def made_of(data: PerturbSeqData, members: np.ndarray) -> DiscrepancyVAE:
    torch.manual_seed(0)
    model = DiscrepancyVAE(data.n_genes, P, 6, n_gene_sets=len(members), causal=False).double()
    model.encoder.hidden.assign(torch.from_numpy(members))  # type: ignore[operator]
    return model


def members_of(*sets: object) -> np.ndarray:
    found = np.zeros((len(sets), G), dtype=bool)
    for row, own in zip(found, sets, strict=True):
        row[list(own)] = True  # type: ignore[call-overload]
    return found


def test_sets_that_are_the_programs_tell_all_of_them(sparse: tuple[PerturbSeqData, np.ndarray, np.ndarray]) -> None:
    data, cells, z = sparse
    model = made_of(data, members_of(*OWN))
    left = start_from_sets(model.encoder, data, cells, z)
    # Ten genes with noise of variance 0.25 each tell a latent of variance 1 but for 1 / (1 + 10 / 0.25).
    assert left == pytest.approx(np.full(P, 1 / 41), rel=0.35)
    read = model.encoder(torch.from_numpy(data.dense(cells)).double())[0].detach().numpy()
    assert ((z - read) ** 2).mean(0) == pytest.approx(left, rel=1e-2)


def test_a_program_outside_of_all_sets_is_not_read(sparse: tuple[PerturbSeqData, np.ndarray, np.ndarray]) -> None:
    data, cells, z = sparse
    left = start_from_sets(made_of(data, members_of(OWN[1], OWN[2])).encoder, data, cells, z)
    assert left[LOST] > 0.95 * z[:, LOST].var()
    assert (left[1:] < 0.05).all()


def test_more_sets_than_cells_can_tell_apart(sparse: tuple[PerturbSeqData, np.ndarray, np.ndarray]) -> None:
    data, cells, z = sparse
    rng = np.random.default_rng(1)
    members = np.vstack([members_of(*OWN), rng.random((400, G)) < 0.1])
    model = made_of(data, members)
    left = start_from_sets(model.encoder, data, cells[:100], z[:100])
    others = torch.from_numpy(data.dense(cells[100:])).double()
    error = ((model.encoder(others)[0].detach().numpy() - z[100:]) ** 2).mean(0)
    assert np.isfinite(left).all() and (error < 0.1).all()  # on cells that it has not seen


def test_constant_genes_have_no_say(sparse: tuple[PerturbSeqData, np.ndarray, np.ndarray]) -> None:
    data, cells, z = sparse
    x = np.array(data.dense(np.arange(len(data.split))))
    x[:, OWN[LOST]] = 3.0
    flat = replace(data, x=x)
    model = made_of(flat, members_of(OWN[LOST], OWN[1], OWN[2]))
    left = start_from_sets(model.encoder, flat, cells, z)
    assert np.isfinite(left).all() and left[LOST] > 0.95 * z[:, LOST].var()
    assert not model.encoder.hidden.weight[0].any()


def test_the_set_that_carries_a_program_comes_first(sparse: tuple[PerturbSeqData, np.ndarray, np.ndarray]) -> None:
    data, cells, z = sparse
    rng = np.random.default_rng(2)
    random = [rng.choice(G, SIZE, replace=False) for _ in range(30)]
    members = members_of(*OWN, *random)
    model = made_of(data, members)
    start_from_sets(model.encoder, data, cells, z)
    names = (*(f"own {k}" for k in range(P)), *(f"random {i}" for i in range(len(random))))
    sets = GeneSets(names, ("",) * len(names), members, tuple((name, "about", ()) for name in names), 0)
    found = pathway_table(model, data, find_programs(model, data), sets)
    first = found[found["rank"] == 1].set_index("program")["gene_set"]
    assert first.to_dict() == {f"P{k}": f"own {k}" for k in range(P)}
    assert found.groupby("program")["rank"].apply(list).tolist() == [list(range(1, 34))] * P
    assert (found.groupby("program")["weight"].apply(lambda own: own.abs().diff().max()) <= 0).all()


def test_weights_by_hand(sparse: tuple[PerturbSeqData, np.ndarray, np.ndarray]) -> None:
    """One set a program: the activity is the program but for its sign, which is that of most of its genes."""
    data, cells, z = sparse
    model = made_of(data, members_of(*OWN))
    start_from_sets(model.encoder, data, cells, z)
    with torch.no_grad():
        model.encoder.mean.weight.copy_(torch.diag(torch.tensor([2.0, -3.0, 0.0])))
        model.encoder.hidden.free[0] *= -1  # what an activity is called changes no claim of the table
        model.encoder.hidden.bias[0] = 1000.0
        model.encoder.mean.weight[0] *= -1
    programs = find_programs(model, data, known_targets=False)
    sets = GeneSets(("a", "b", "c"), ("",) * 3, members_of(*OWN), tuple((name, "", ()) for name in "abc"), 0)
    found = pathway_table(model, data, programs, sets)
    wide = found.pivot(index="program", columns="gene_set", values="weight")
    expected = pd.DataFrame(np.zeros((3, 3)), index=wide.index, columns=wide.columns)
    expected.loc["P0", "a"], expected.loc["P1", "b"] = 1.0, 1.0
    assert wide.abs().to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-6)

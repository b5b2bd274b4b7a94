"""The numbers of programs: by hand, and of a discovery."""

from __future__ import annotations

import numpy as np
import torch

from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.discovery.numbering import explained_by, numbered
from crlseq.discovery.task import Task
from tests.support import small_screen


def graph(p: int, *edges: tuple[int, int]) -> torch.Tensor:
    adjacency = torch.zeros(p, p)
    for edge in edges:
        adjacency[edge] = -0.5
    return adjacency


def test_what_explains_most_comes_first() -> None:
    assert numbered(graph(4), np.array([0.1, 3.0, -1.0, 2.0])).tolist() == [1, 3, 0, 2]


def test_ancestors_come_first() -> None:
    # 2 explains most, but lies downstream of 0; once 0 is out, 2 is free and goes before 1 and 3.
    assert numbered(graph(4, (0, 2)), np.array([0.1, 3.0, 9.0, 2.0])).tolist() == [1, 3, 0, 2]
    assert numbered(graph(4, (0, 2)), np.array([2.5, 3.0, 9.0, 2.0])).tolist() == [1, 0, 2, 3]


def test_equal_programs_keep_their_order() -> None:
    assert numbered(graph(3), np.zeros(3)).tolist() == [0, 1, 2]


def screen() -> PerturbSeqData:
    return read_data(small_screen(), make_config().data, 0)


def test_explained_effects() -> None:
    """One perturbation a program is explained whole; of two with equal shifts, what their mean explains; less the noise."""
    data = screen()
    cells = data.cells_by_condition(splits.TRAIN)
    where = {parts[0]: c for c, parts in enumerate(data.conditions) if len(parts) == 1}
    control = rows(data, cells[0])
    effect, noise, n = {}, {}, {}
    for k in range(3):
        own = rows(data, cells[where[k]])
        effect[k], n[k] = own.mean(0) - control.mean(0), len(own)
        noise[k] = (own.var(0, ddof=1) / len(own) + control.var(0, ddof=1) / len(control)).sum()
    target = np.array([2, 0, 0, -1, -1, -1])
    task = Task(data, np.ones(6), make_config().model, 0)
    found = explained_by(task, target, np.array([7.0, 1.5, 1.5, 0, 0, 0]), 4)
    a, b = n[1] / (n[1] + n[2]), n[2] / (n[1] + n[2])
    mean = a * effect[1] + b * effect[2]
    both = sum(float((effect[k] ** 2).sum() - ((effect[k] - mean) ** 2).sum()) for k in (1, 2))
    both -= 2 * (a * noise[1] + b * noise[2]) - 2 * (a**2 * noise[1] + b**2 * noise[2])
    np.testing.assert_allclose(found, [both, 0, (effect[0] ** 2).sum() - noise[0], 0], rtol=1e-5, atol=1e-12)


def rows(data: PerturbSeqData, index: np.ndarray) -> np.ndarray:
    return data.dense(index).astype(float)

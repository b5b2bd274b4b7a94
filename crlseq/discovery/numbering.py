"""In which order programs are numbered: ancestors first, and what the graph leaves free by what they explain of the effects."""

from __future__ import annotations

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from crlseq.data import splits
from crlseq.data.mean_effects import MIN_CELLS, controls_by_batch, mean_effect
from crlseq.discovery.task import Task


def numbered(adjacency: Tensor, explained: np.ndarray) -> Tensor:
    """The topological order (p,) in which, of programs that the graph leaves free, that with the largest part ``explained``
    (p,) of the effects comes first.
    """
    graph = nx.from_numpy_array((adjacency != 0).numpy(), create_using=nx.DiGraph)
    return torch.tensor([*nx.lexicographical_topological_sort(graph, key=lambda k: -explained[k])])


def explained_by(task: Task, target: np.ndarray, shift: np.ndarray, p: int) -> np.ndarray:
    """What each program explains of squared mean effects, before anything is trained (p,): that of shifts along one line.

    With the mean effects m_c of the training cells of a program's perturbations, their squared errors e_c (summed over genes),
    n_c cells and shifts s_c, T = sum_c w_c m_c is the least-squares line through them, w_c = n_c s_c / sum_c n_c s_c^2, and

        E = sum_c (|m_c|^2 - |m_c - s_c T|^2) - [2 sum_c s_c w_c e_c - (sum_c s_c^2) (sum_c w_c^2 e_c)],

    of which the bracket is what noise alone would explain. ``target`` (K,), -1 without a claim, and ``shift`` (K,) of all
    cells. `crlseq.readout.explained` says it of the trained model.
    """
    cells = task.data.cells_by_condition(splits.TRAIN)
    controls = controls_by_batch(task.data, cells[0])
    found: dict[int, list[tuple[float, float, float, np.ndarray]]] = {}
    for own, parts in zip(cells, task.data.conditions, strict=True):
        if len(parts) == 1 and target[parts[0]] >= 0 and len(own) >= MIN_CELLS:
            effect, *noise = mean_effect(task.data, own, controls)
            row = (len(own), float(shift[parts[0]]), float(np.sum(noise)), effect)
            found.setdefault(int(target[parts[0]]), []).append(row)
    explained = np.zeros(p)
    for k, rows in found.items():
        n, s, e, m = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
        w = n * s / max(float(n @ s**2), 1e-300)
        by_noise = 2 * (s * w) @ e - (s @ s) * (w**2 @ e)
        explained[k] = (m**2).sum() - ((m - np.outer(s, w @ m)) ** 2).sum() - by_noise
    return explained

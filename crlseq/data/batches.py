"""Batches of (control, perturbed) cells, several conditions each, as indices; rows are fetched apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crlseq.data.splits import in_random_order

SHARED = 2  # controls that the pieces of a step choose among, as a multiple of the largest piece


@dataclass(frozen=True)
class BatchIndex:
    """Cells of one step: C conditions with up to B perturbed cells and as many control partners."""

    condition: np.ndarray  # (C,)
    perturbed: np.ndarray  # (C, B) cells
    control: np.ndarray  # (C, B) cells
    mask: np.ndarray  # (C, B) False where a row only fills up


class ControlPartners:
    """Draws partners of perturbed cells from `controls` (indices of cells) of the same `batch` (cells,).

    A batch without controls draws from all of them.
    """

    def __init__(self, controls: np.ndarray, batch: np.ndarray) -> None:
        self.batch = batch
        self.pools = {int(b): controls[batch[controls] == b] for b in np.unique(batch[controls])}
        self.everyone = controls

    def draw_shared(self, pieces: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
        """One control per cell of pieces that make one step; none twice in a piece and batch while the pool lasts.

        All choose from the same few, `SHARED` times as many as the largest piece takes, so that a step reads and
        encodes each control once, whatever the number of pieces.
        """
        partners = [np.empty(len(cells), dtype=np.int64) for cells in pieces]
        for b in np.unique(self.batch[np.concatenate(pieces)]):
            pool = self.pools.get(int(b), self.everyone)
            places = [np.flatnonzero(self.batch[cells] == b) for cells in pieces]
            # A few of a large pool: sampling by rejection inside `choice` beats shuffling the pool.
            few = rng.choice(pool, min(len(pool), SHARED * max(map(len, places))), replace=False)
            for own, there in zip(partners, places, strict=True):
                rounds = [rng.permutation(few) for _ in range(-(-len(there) // len(few)))]
                own[there] = np.concatenate(rounds)[: len(there)] if rounds else []
        return partners


def epoch_batches(
    cells_by_condition: Sequence[np.ndarray],
    partners: ControlPartners,
    batch_size: int,
    conditions_per_step: int,
    rng: np.random.Generator,
    shuffled: bool = False,
) -> list[BatchIndex]:
    """Every perturbed cell once, with a fresh control partner, in random order.

    A condition's cells are shuffled and cut into even pieces of at most `batch_size`; a step takes
    `conditions_per_step` pieces. Pieces of fewer than two cells are left out: no MMD without a pair. Where the cells of
    a condition lie `shuffled`, pieces are runs of neighbours, which a store reads at once.
    """
    pieces: list[tuple[int, np.ndarray]] = []
    for c, cells in enumerate(cells_by_condition):
        if c == 0 or len(cells) < 2:
            continue
        drawn = in_random_order(cells, rng, shuffled)
        pieces += [(c, piece) for piece in np.array_split(drawn, -(-len(cells) // batch_size)) if len(piece) >= 2]
    order = rng.permutation(len(pieces))
    return [
        _batch([pieces[i] for i in order[start : start + conditions_per_step]], partners, rng)
        for start in range(0, len(order), conditions_per_step)
    ]


def _batch(pieces: list[tuple[int, np.ndarray]], partners: ControlPartners, rng: np.random.Generator) -> BatchIndex:
    shape = (len(pieces), max(len(cells) for _, cells in pieces))
    mask, (perturbed, control) = np.zeros(shape, dtype=bool), np.zeros((2, *shape), dtype=np.int64)
    drawn = partners.draw_shared([cells for _, cells in pieces], rng)
    for row, ((_, cells), controls) in enumerate(zip(pieces, drawn, strict=True)):
        perturbed[row, : len(cells)] = cells
        control[row, : len(cells)] = controls
        mask[row, : len(cells)] = True
    return BatchIndex(np.array([c for c, _ in pieces]), perturbed, control, mask)

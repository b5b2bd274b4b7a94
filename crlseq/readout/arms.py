"""Lost chromosome arms: do the genes beside a perturbation's target fall together?

A cut of Cas9 can cost a cell the chromosome from the cut to its end, or all of it (Nahmad et al. 2022, Nat Biotechnol 40;
Lazar et al. 2024, Nat Genet 56). The perturbation's effect is then the loss of those genes, and so is its program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata, t

from crlseq.data.dataset import PerturbSeqData
from crlseq.data.positions import Positions, names_of
from crlseq.discovery.effects import benjamini_hochberg
from crlseq.run.columns import ARM_COLUMNS
from crlseq.run.schema import DETECTABLE_FDR

FEWEST_GENES = 5  # of a stretch: fewer can fall together for one reason of their own
FEWEST_STRETCHES = 5  # as long, that fit on the other chromosomes: fewer do not tell their spread


@dataclass(frozen=True)
class Genome:
    """The fitted genes with positions, in the order of the genome: `gene` their places, `chromosome`, `start` and `arm` (N,).

    `target` has chromosome and start of each perturbation's target, None where they are not known.
    """

    positions: Positions
    gene: np.ndarray
    chromosome: np.ndarray
    start: np.ndarray
    arm: np.ndarray
    target: tuple[tuple[str, float] | None, ...]

    @classmethod
    def of(cls, data: PerturbSeqData) -> Genome | None:
        """Of a screen; None where no positions are known."""
        if data.positions is None:
            return None
        names, positions = data.preprocessing.gene_names, data.positions
        found = [(j, *at) for j in range(data.n_genes) if (at := positions.find(names.all_of(j)))]
        found.sort(key=lambda row: (row[1], row[2], row[0]))
        called = dict(zip(data.labels.names, data.labels.targets, strict=True))
        return cls(
            positions,
            gene=np.array([row[0] for row in found], dtype=np.int64),
            chromosome=np.array([row[1] for row in found], dtype=object),
            start=np.array([row[2] for row in found], dtype=float),
            arm=np.array([positions.arm(row[1], row[2]) for row in found], dtype=object),
            target=tuple(positions.find(names_of(data.measured, called[name])) for name in data.perturbation_names),
        )

    def stretches(self, chromosome: str, start: float) -> dict[tuple[str, str], np.ndarray]:
        """(N,) bool genes of each part of a chromosome that a cut at ``start`` makes, by arm and part.

        ``distal``: from the target to the end of its arm; ``proximal``: to the centromere; ``other arm``. ``before`` and
        ``after`` the target where centromeres are not known.
        """
        here, own = self.chromosome == chromosome, self.positions.arm(chromosome, start)
        before, after = here & (self.start < start), here & (self.start > start)
        if not own:
            return {("", "before"): before, ("", "after"): after}
        beyond, inner = (before, after) if own == "p" else (after, before)
        other = "q" if own == "p" else "p"
        return {
            (own, "distal"): beyond & (self.arm == own),
            (own, "proximal"): inner & (self.arm == own),
            (other, "other arm"): here & (self.arm == other),
        }


def arm_rows(
    data: PerturbSeqData, genome: Genome, k: int, change: np.ndarray, se: np.ndarray, told: np.ndarray
) -> list[dict[str, Any]]:
    """A row for each stretch beside the target of perturbation ``k`` that has genes enough; none where it has no position.

    ``change`` (G,) of log expression with errors ``se``, and ``told`` what its program says of it. Own transcripts are left out.
    """
    if (at := genome.target[k]) is None:
        return []
    usable = (se[genome.gene] > 0) & ~np.isin(genome.gene, data.own_genes[k])
    z = np.divide(change, se, out=np.zeros_like(change), where=se > 0)
    away = genome.chromosome != at[0]
    rows = []
    for (arm, part), stretch in genome.stretches(*at).items():
        one, others = genome.gene[stretch & usable], genome.gene[away & usable]
        if len(one) < FEWEST_GENES or len(others) < FEWEST_STRETCHES * len(one):
            continue
        both = np.concatenate([one, others])
        size, error, _ = beside_windows(change[both], len(one))
        row = {
            "perturbation": data.perturbation_names[k], "chromosome": at[0], "arm": arm, "part": part,
            "n_genes": len(one), "change": size, "se": error, "p_value": beside_windows(rankdata(z[both]), len(one))[2],
            "program_part": np.nan, "program_p_value": np.nan,
        }  # fmt: skip
        if np.isfinite(known := told[both]).all():
            row["program_part"] = beside_windows(known, len(one))[0]
            row["program_p_value"] = beside_windows(rankdata(known), len(one))[2]
        rows.append(row)
    return rows


def beside_windows(values: np.ndarray, n: int) -> tuple[float, float, float]:
    """The mean of the first ``n`` values minus that of the others, its standard error, and the p-value of so low a mean.

    Neighbouring genes go together, so chance is what ``n`` neighbours among the others do: their means in circular windows
    have a variance about the others' mean that is (1 - n/N) of a stretch's, and Student's t the freedom of N/n - 1
    stretches that do not overlap. Where windows below the mean spread more, as clusters of genes that a program lowers do,
    their variance is taken; and p is no smaller than the share of windows that are as low.
    """
    others = values[n:]
    fit = len(others) / n
    sums = np.concatenate([[0.0], np.cumsum(np.concatenate([others, others[: n - 1]]))])
    means = (sums[n:] - sums[:-n]) / n - others.mean()
    below = means[means < 0]
    spread = max(np.mean(means**2), np.mean(below**2) if len(below) else 0.0)
    size, error = float(values[:n].mean() - others.mean()), float(np.sqrt(spread / (1 - 1 / fit) * (1 + 1 / fit)))
    if not error > 0:
        return size, error, float("nan")
    return size, error, max(float(t.cdf(size / error, fit - 1)), float(np.mean(means <= size)))


def arm_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """`ARM_COLUMNS`, the surest loss first. FDR: Benjamini-Hochberg over all stretches of all perturbations."""
    table = pd.DataFrame(rows, columns=[name for name in ARM_COLUMNS if name not in ("fdr", "lost", "program_fdr")])
    fdr = benjamini_hochberg(table["p_value"].to_numpy(float))
    of_program = benjamini_hochberg(table["program_p_value"].to_numpy(float))
    table = table.assign(fdr=fdr, lost=(fdr <= DETECTABLE_FDR) & (table["change"] < 0), program_fdr=of_program)
    return table[list(ARM_COLUMNS)].sort_values(["p_value", "perturbation"], kind="stable", ignore_index=True)

"""Configuration: what a run was asked to do, with ranges, presets and TOML in and out.

Three parts: ``DataConfig`` (how the file is read), ``ModelConfig`` (what is fitted) and
``TrainingConfig`` (how). Defaults are the default preset; `PRESETS` lists what others change.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crlseq.errors import InputError, UsageError

Device = Literal["auto", "cpu", "cuda"]
InterventionKind = Literal["shift", "hard", "soft"]  # what each is: `crlseq.model.interventions`


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(_Section):
    """How cells, labels and genes are read from the file."""

    perturbation_key: str | None = None  # None: detected
    control_label: str | None = None  # None: detected
    separator: str | None = None  # None: detected; "" for labels that are never combinations
    guide_key: str | None = None  # column of guide names, read as perturbations (`crlseq.data.guides`)
    guide_counts: str | None = None  # guide counts in obsm, or a modality of a MuData file
    guide_map: str | None = None  # table of guides and genes; None: by their names
    guide_min_umis: int = Field(default=5, ge=1)
    guide_min_share: float = Field(default=0.8, gt=0.5, le=1.0)
    batch_key: str | None = None
    layer: str | None = None  # None: X
    values: Literal["auto", "counts", "log", "continuous"] = "auto"
    n_top_genes: Annotated[int, Field(ge=2)] | Literal["all"] = 5000
    genes: tuple[str, ...] | None = None  # these genes and no others
    min_cells: int = Field(default=10, ge=2)  # per condition; fewer cells say nothing of a distribution
    hold_out: tuple[str, ...] = ()  # conditions kept out of the fit
    hold_out_cells: float = Field(default=0.0, ge=0.0, lt=1.0)  # share of every condition kept for testing
    validation_cells: float = Field(default=0.1, gt=0.0, lt=0.5)  # share of every condition for early stopping
    responders: bool = False  # leave out cells that escaped their perturbation (`crlseq.data.responders`)
    embeddings: str | None = None  # table of gene vectors, from which perturbations never seen are extrapolated
    gene_sets: str | None = None  # gmt file of the sets that the encoder reads
    streamed: bool | None = None  # a prepared store: read as training goes, or loaded; None: by its size
    combinations: bool = True  # False: fit on single perturbations alone, hold every combination out


class ModelConfig(_Section):
    """Networks, structural equations and losses (SCIENCE: Zhang et al. 2023, arXiv 2307.06250)."""

    method: Literal["straighten", "linear", "gradient"] = "straighten"  # how targets and graph are found
    n_latents: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    n_hidden: int = Field(default=128, ge=1)
    intervention: Literal["auto", InterventionKind] = "auto"
    equations: Literal["auto", "linear", "nonlinear"] = "auto"
    decoder: Literal["dense", "sparse"] = "dense"  # sparse: a program moves few genes, under a spike-and-slab lasso
    causal_layer: bool = True  # False: the paper's ablation with u = z + shifts
    gene_set_leak: float = Field(default=0.0, ge=0.0, lt=1.0)  # what genes outside a set count for its activity
    output_activation: Literal["identity", "leaky_relu"] = "identity"
    noise: Literal["gaussian", "none"] = "gaussian"  # gaussian: per-gene noise, learned, and abducted with z
    mmd_weight: float = Field(default=10.0, ge=0.0)  # 0: the ablation without MMD
    mmd_estimator: Literal["unbiased", "biased"] = "unbiased"
    mmd_bandwidth: Annotated[float, Field(gt=0.0)] | Literal["median"] = (
        "median"  # sigma; "median": median squared distance
    )
    mmd_kernels: int = Field(default=5, ge=1, le=20)
    kl_weight: float = Field(default=1.0, ge=0.0)
    graph_weight: float = Field(default=1e-3, ge=0.0)
    bootstrap: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"  # replicates; auto: 20, none from 20 latents on
    max_temperature: float = Field(default=5.0, ge=1.0)


class TrainingConfig(_Section):
    """Optimisation and hardware."""

    epochs: int | None = Field(default=None, ge=1)  # None: 100, or more on a small screen (`resolve_epochs`)
    batch_size: int = Field(default=64, ge=2)  # perturbed cells of one perturbation in a step
    perturbations_per_step: int | None = Field(default=None, ge=1)  # None: 8, or more of a large screen
    learning_rate: float = Field(default=1e-3, gt=0.0)
    gradient_norm: float | None = Field(default=10.0, gt=0.0)  # None: no clipping
    patience: float | None = Field(default=0.2, gt=0.0)  # share of the epochs without a better validation loss
    schedule: Literal["scaled", "published"] = "scaled"
    dtype: Literal["float32", "float64"] = "float32"
    seed: int = Field(default=0, ge=0, lt=2**32)
    ensemble: int = Field(default=1, ge=1, le=100)  # models of consecutive seeds; the one that validates best is kept
    threads: int | None = Field(default=None, ge=1)
    device: Device = "auto"


class Config(_Section):
    """Everything that decides a fit; written to ``run.json`` and read from ``--config``."""

    preset: Literal["default", "paper"] = "default"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.training.ensemble > 1 and self.model.method == "linear":
            raise UsageError(
                "The linear method trains no network, so there are no seeds to compare.",
                "Drop --ensemble or --method linear.",
            )
        output = (self.model.noise, self.model.output_activation)
        if self.model.decoder == "sparse" and output != ("gaussian", "identity"):
            raise UsageError(
                "The sparse decoder needs noise = gaussian and output_activation = identity.",
                "Drop --decoder sparse or the preset paper.",
            )
        return self


# The published model (SCIENCE section 2): its network, losses, schedules and optimiser.
MAX_TOML = 1 << 20  # bytes
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "paper": {
        "data": {"combinations": False},
        "model": {
            "method": "gradient",
            "bootstrap": 0,
            "intervention": "shift",
            "equations": "linear",
            "output_activation": "leaky_relu",
            "noise": "none",
            "mmd_estimator": "biased",
            "mmd_bandwidth": 1000.0,
            "mmd_kernels": 10,
            "kl_weight": 2.0,
        },
        "training": {
            "epochs": 100,
            "batch_size": 32,
            "perturbations_per_step": 1,
            "gradient_norm": None,
            "patience": None,
            "schedule": "published",
            "dtype": "float64",
        },
    },
}


SECTIONS: dict[str, type[_Section]] = {"data": DataConfig, "model": ModelConfig, "training": TrainingConfig}


def make_config(preset: str | None = None, file: Mapping[str, Any] | None = None, **options: Any) -> Config:
    """Preset, then configuration file, then options; later ones win.

    Parameters
    ----------
    preset
        ``default`` or ``paper``; None takes the file's, or ``default``.
    file
        Contents of a TOML file: optional ``preset`` and tables ``data``, ``model``, ``training``.
    options
        Fields of any of the three parts by name; ``None`` means "not given".

    Raises
    ------
    UsageError
        For an unknown name or a value out of range.

    Examples
    --------
    >>> from crlseq.config import make_config
    >>> make_config("paper", n_latents=8).model.n_latents, make_config().model.n_latents
    (8, 'auto')
    """
    file = dict(file or {})
    preset = str(preset or file.pop("preset", "default"))
    file.pop("preset", None)
    if preset not in PRESETS:
        raise UsageError(f"There is no preset {preset!r}.", f"Presets are {', '.join(PRESETS)}.")
    given: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name, value in options.items():
        owners = [section for section, model in SECTIONS.items() if name in model.model_fields]
        if not owners:
            raise UsageError(f"There is no option {name!r}.", "See `crlseq fit --help` for the options.")
        if value is not None:
            given[owners[0]][name] = value
    merged: dict[str, Any] = {name: {} for name in SECTIONS}
    for layer in (PRESETS[preset], file, given):
        for section, values in layer.items():
            if section not in SECTIONS or not isinstance(values, Mapping):
                raise UsageError(
                    f"{section!r} is not a table of options.", "Tables are [data], [model] and [training]."
                )
            merged[section].update(values)
    try:
        return Config.model_validate({"preset": preset, **merged})
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> UsageError:
    """The first thing that is wrong, named as the user wrote it."""
    first = error.errors(include_url=False)[0]
    section, name = map(str, first["loc"][:2])
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, SECTIONS[section].model_fields, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "See `crlseq fit --help` for the options."
        return UsageError(f"There is no option {name!r} in [{section}].", hint)
    # A union such as "a number or 'all'" says once for each part what it should be.
    same = [e["msg"] for e in error.errors(include_url=False) if e["loc"][:2] == first["loc"][:2]]
    reason = " or ".join(dict.fromkeys(message.removeprefix("Input should be ") for message in same))
    return UsageError(
        f"Option {name} is {first['input']!r} instead of {reason}.", "See `crlseq fit --help` for the options."
    )


def read_toml(path: Path) -> dict[str, Any]:
    """Contents of a configuration file.

    Raises
    ------
    InputError
        If the file cannot be read or is not TOML.
    """
    try:
        with path.open("rb") as handle:
            text = handle.read(MAX_TOML + 1)
        if len(text) > MAX_TOML:
            raise InputError(f"The configuration {path} has more than {MAX_TOML >> 10} KiB.", "Check the path.")
        return tomllib.loads(text.decode())
    except OSError as error:
        raise InputError(f"The configuration {path} cannot be read: {error.strerror}.", "Check the path.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"The configuration {path} is not TOML: {error}.", "See https://toml.io for the format."
        ) from None


def _toml(value: Any) -> str:
    """JSON strings, numbers, booleans and flat lists are TOML, but for pairs of surrogates and a bare DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def to_toml(config: Config) -> str:
    """The configuration as TOML that `read_toml` and `make_config` take back; unset options are left out."""
    lines = [f"preset = {_toml(config.preset)}"]
    for section in ("data", "model", "training"):
        lines.append(f"\n[{section}]")
        values = getattr(config, section).model_dump(mode="json", exclude_none=True)
        lines += [f"{name} = {_toml(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"

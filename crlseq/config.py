"""Configuration: what a run was asked to do, with ranges, presets and TOML in and out.

Defaults are the default preset; `PRESETS` lists what others change. A field made by `_flag` is an option of the command
line too (`crlseq.cli.options`); one made by `_field` is set in a configuration file or in Python. Help, default and range
stand in the field and nowhere else.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from crlseq.errors import InputError, UsageError, nearest, suggestion


def _numbered(value: str) -> str:
    if not re.fullmatch(r"cuda:[0-9]{1,3}", value):
        raise PydanticCustomError("device", "'cuda:' and a number")
    return value


Device = Literal["auto", "cpu", "cuda"] | Annotated[str, AfterValidator(_numbered)]
InterventionKind = Literal["shift", "hard", "soft"]  # what each is: `crlseq.model.interventions`


def _field(default: Any, text: str, **limits: Any) -> Any:
    """A field of a configuration file or of Python alone."""
    return Field(default, description=text, **limits)


def _flag(
    default: Any, text: str, *, unset: str = "", panel: str = "", switch: str = "", shell: str = "", **limits: Any
) -> Any:
    """A field that is an option of the command line as well, with `text` as its help.

    `unset` says what None stands for; `panel` is another heading in the help than the section's; `switch` names an option
    without a value; `shell` is what is typed in place of the value: the "path" of a file, or of one with a value on each of its "lines".
    """
    flag: dict[str, Any] = {"unset": unset, "panel": panel, "switch": switch, "shell": shell}
    return _field(default, text, json_schema_extra={"flag": flag}, **limits)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(_Section):
    """How cells, labels and genes are read from the file."""

    perturbation_key: str | None = _flag(None, "Column of obs with the perturbations.", unset="detected")
    control_label: tuple[str, ...] | None = _flag(
        None, "Label of control cells (NT also stands for NT-1, NT-2); may be repeated.", unset="detected"
    )
    separator: str | None = _flag(
        None, "Separates the parts of a combination; '' where labels are never combinations.", unset="detected"
    )
    guide_key: str | None = _flag(None, "Column of guides (STAT1g2), read as the genes they target.", panel="Guides")
    guide_counts: str | None = _flag(
        None, "Guide counts that assign cells: a table in obsm, a modality, or a type of feature in X.", panel="Guides"
    )
    guide_map: str | None = _flag(
        None, "Table of guides and their genes.", unset="read from the guide names", panel="Guides", shell="path"
    )
    guide_min_umis: int = _flag(5, "Fewest UMIs of a gene's guides in a cell that carries it.", panel="Guides", ge=1)
    guide_min_share: float = _flag(
        0.8, "Smallest share of a cell's guide UMIs that its gene must have.", panel="Guides", gt=0.5, le=1.0
    )
    drop_outlier_guides: bool = _flag(
        False,
        "Leave out guides that do nothing, by what the other guides of their gene do.",
        panel="Guides",
        switch="--drop-outlier-guides/--all-guides",
    )
    batch_key: str | None = _flag(
        None, "Column of experimental batches; a cell is compared with controls of its own batch."
    )
    context_key: str | None = _flag(
        None, "Column of contexts (stimulation, drug, time, cell line), each with its own controls."
    )
    covariates: tuple[str, ...] = _flag(
        (),
        "Columns of obs whose effects are taken off, such as donor,age; cell-cycle and log-depth are computed. "
        "May be repeated.",
        panel="Covariates",
    )
    remove_covariate_effects: bool = _flag(
        False,
        "Take off what perturbations do to covariates, such as an arrest of the cell cycle, or keep and report it.",
        panel="Covariates",
        switch="--remove-covariate-effects/--keep",
    )
    layer: str | None = _flag(None, "Layer with the expression values, or raw for .raw.", unset="X")
    values: Literal["auto", "counts", "log", "continuous"] = _flag("auto", "Kind of expression values.")
    n_top_genes: Annotated[int, Field(ge=2)] | Literal["all"] = _flag(5000, "Number of most variable genes to fit.")
    genes: tuple[str, ...] | None = _flag(
        None, "File with the genes to fit, one per line.", unset="most variable genes", shell="lines"
    )
    # Fewer cells say nothing of a distribution.
    min_cells: int = _flag(10, "Exclude perturbations with fewer cells.", ge=2)
    hold_out: tuple[str, ...] = _flag((), "A condition to hold out; may be repeated.")
    hold_out_cells: float = _flag(0.0, "Share of each condition's cells to hold out.", ge=0.0, lt=1.0)
    validation_cells: float = _field(
        0.1, "Share of each condition's cells that early stopping is judged by.", gt=0.0, lt=0.5
    )
    embeddings: str | None = _flag(
        None,
        "Table of gene vectors (CSV, TSV or h5ad), from which `predict` extrapolates to genes never perturbed; screen: "
        "the genes' co-expression in control cells.",
        shell="path",
    )
    gene_sets: str | None = _flag(
        None, "A gmt file: the encoder reads its gene sets, and each program is a combination of them.", shell="path"
    )
    gene_positions: str | None = _flag(
        None,
        "Where genes lie: GTF, BED, or CSV with gene, chromosome and start. Tells whether cells lost chromosome arms.",
        unset="columns of var",
        shell="path",
    )
    streamed: bool | None = _flag(
        None, "Read a prepared store during training, or load it whole.", unset="by its size",
        switch="--streamed/--in-memory",
    )  # fmt: skip
    targets: str | None = _flag(
        None,
        "Table of perturbations and their programs (CSV), upstream programs first, for --method cauca.",
        unset="not known",
        shell="path",
    )
    combinations: bool = _flag(
        True, "Fit combinations too, or hold all of them out.", switch="--combinations/--no-combinations"
    )

    @field_validator("control_label", mode="before")
    @classmethod
    def _one_label(cls, value: Any) -> Any:
        """A single label, as in Python and in earlier configurations."""
        return (value,) if isinstance(value, str) else value


FACTORS = ("varimax", "squires", "score-linear", "multi-node")  # methods that have neither likelihood nor networks
# Methods that train networks of their own on components.
NETWORKS = ("score", "contrastive", "cauca", "icm-flow", "diffusion")


Method = Literal[
    "straighten", "linear", "changes", "gradient", "varimax", "squires", "score-linear", "multi-node", "score", "contrastive",
    "cauca", "icm-flow", "diffusion",
]  # fmt: skip


class ModelConfig(_Section):
    """Networks, structural equations and losses (Zhang et al. 2023, arXiv 2307.06250)."""

    method: Method = _flag(
        "straighten",
        "How targets and graph are found: by likelihood, then networks (straighten), by likelihood alone in seconds "
        "(linear), or with the networks (gradient). "
        "changes: by likelihood, and the graph by what interventions change alone. "
        "varimax: rotated principal components, without a graph. squires: precision matrices, one perturbation a program. "
        "score-linear: score differences, the same; multi-node: each perturbation on several programs; score: two perturbations a program, where the mixing is curved. "
        "contrastive: a classifier, one perturbation a program, where the mixing is curved. "
        "cauca: a normalizing flow, with --targets. icm-flow: an autoencoder with equations of the kind flow. "
        "diffusion: the same, with a diffusion decoder of counterfactuals.",
    )
    n_latents: Annotated[int, Field(ge=1)] | Literal["auto"] = _flag("auto", "Number of programs.")
    n_hidden: int = _field(128, "Width of the networks' hidden layers.", ge=1)
    intervention: Literal["auto", InterventionKind] = _flag(
        "auto", "What perturbations do to their program; auto: the kind that the data favour."
    )
    equations: Literal["auto", "linear", "nonlinear", "flow"] = _flag(
        "auto",
        "Structural equations; auto: linear unless the data contradict them. flow: parents move mean and noise through "
        "networks, with --method gradient, icm-flow or diffusion.",
    )
    decoder: Literal["dense", "sparse"] = _flag(
        "dense", "sparse: programs are short lists of genes, under a spike-and-slab lasso."
    )
    causal_layer: bool = _field(True, "false: the paper's ablation, u = z + shifts without a graph.")
    gene_set_leak: float = _field(0.0, "Weight of genes outside a gene set in its activity.", ge=0.0, lt=1.0)
    output_activation: Literal["identity", "leaky_relu"] = _field("identity", "Of the decoder.")
    noise: Literal["gaussian", "none"] = _field("gaussian", "gaussian: noise per gene, learned, and abducted with z.")
    mmd_weight: float = _field(10.0, "Of the discrepancy in the loss; 0: the ablation without it.", ge=0.0)
    mmd_estimator: Literal["unbiased", "biased"] = _field("unbiased", "Of the squared MMD.")
    mmd_bandwidth: Annotated[float, Field(gt=0.0)] | Literal["median"] = _field(
        "median", "sigma of the kernels; median: the median squared distance."
    )
    mmd_kernels: int = _field(5, "Number of Gaussian kernels.", ge=1, le=20)
    kl_weight: float = _field(1.0, "Of the Kullback-Leibler term in the loss.", ge=0.0)
    graph_weight: float = _field(1e-3, "Of the graph's L1 penalty.", ge=0.0)
    bootstrap: Annotated[int, Field(ge=0)] | Literal["auto"] = _flag(
        "auto", "Bootstrap replicates, which give edges and targets their support; auto: 20, none from 20 programs on."
    )
    max_temperature: float = _field(5.0, "Final sharpness of the soft assignment to programs.", ge=1.0)

    @property
    def trains(self) -> bool:
        """Whether networks are trained; else expression is linear in what the method found."""
        return self.method not in ("linear", "changes", *FACTORS)


class TrainingConfig(_Section):
    """Optimisation and hardware."""

    epochs: int | None = _flag(
        None, "Largest number of passes over the cells.", unset="100, or more for a small screen", ge=1
    )
    batch_size: int = _flag(64, "Perturbed cells of one condition per step.", ge=2)
    perturbations_per_step: int | None = _field(None, "Unset: 8, or more for a screen with many perturbations.", ge=1)
    learning_rate: float = _field(1e-3, "Of Adam.", gt=0.0)
    gradient_norm: float | None = _field(10.0, "Largest norm of the gradient; unset: no clipping.", gt=0.0)
    patience: float | None = _field(
        0.2, "Share of the epochs without a better validation loss that ends training.", gt=0.0
    )
    schedule: Literal["scaled", "published"] = _field(
        "scaled", "How the weights of the loss terms rise; published: as in the paper's code."
    )
    dtype: Literal["float32", "float64"] = _flag("float32", "Precision; the preset paper has float64.")
    seed: int = _flag(0, "Seed of all random numbers.", ge=0, lt=2**32)
    # The one that validates best is kept.
    ensemble: int = _flag(
        1, "Models of consecutive seeds, trained together; ensemble.csv reports what they agree on.", ge=1, le=100
    )
    threads: int | None = _flag(None, "CPU threads.", unset="all", ge=1)
    device: Device = _flag("auto", "Where to compute; cuda:1 is the second CUDA device.")


class Config(_Section):
    """Everything that decides a fit; written to ``run.json`` and read from ``--config``."""

    preset: Literal["default", "paper"] = "default"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.training.ensemble > 1 and not self.model.trains:
            method = self.model.method
            message = f"The {method} method trains no network, so there are no seeds to compare."
            raise UsageError(message, f"Drop --ensemble or --method {method}.")
        if self.model.method == "cauca" and self.data.targets is None:
            hint = "Give a table: --targets FILE, with a perturbation and its program a line, upstream programs first."
            raise UsageError("The method cauca needs the program of each perturbation.", hint)
        if self.model.method != "cauca" and self.data.targets is not None:
            message = f"The method {self.model.method} finds the programs of perturbations, and takes no --targets."
            raise UsageError(message, "Drop --targets, or take --method cauca.")
        if self.model.equations == "flow" and self.model.method not in ("gradient", "icm-flow", "diffusion"):
            message = f"The method {self.model.method} has no equations of the kind flow."
            raise UsageError(message, "Take --method gradient, icm-flow or diffusion, or drop --equations flow.")
        output = (self.model.noise, self.model.output_activation)
        if self.model.decoder == "sparse" and output != ("gaussian", "identity"):
            message = "The sparse decoder needs noise = gaussian and output_activation = identity."
            raise UsageError(message, "Drop --decoder sparse or the preset paper.")
        return self


# paper: network, losses, schedules and optimiser as published (Zhang et al. 2023, arXiv 2307.06250, and its code).
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
MAX_TOML = 1 << 20  # bytes
HELP = "See `crlseq fit --help` for the options."
SECTIONS: dict[str, type[_Section]] = {"data": DataConfig, "model": ModelConfig, "training": TrainingConfig}


def make_config(preset: str | None = None, file: Mapping[str, Any] | None = None, **options: Any) -> Config:
    """Preset, then configuration file, then options; later ones win.

    A preset of None is the file's, or ``default``. `file` is the contents of a TOML file: optional ``preset`` and tables
    ``data``, ``model``, ``training``. `options` are fields of any of the three by name; ``None`` means "not given".
    An unknown name or a value out of range is refused by `UsageError`.

    Examples
    --------
    >>> from crlseq.config import make_config
    >>> make_config("paper", n_latents=8).model.n_latents, make_config().model.n_latents
    (8, 'auto')
    """
    file = dict(file or {})
    in_file = file.pop("preset", "default")
    preset = str(preset or in_file)
    if preset not in PRESETS:
        raise UsageError(f"There is no preset {preset!r}.", suggestion(preset, PRESETS, "Presets are"))
    given: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name, value in options.items():
        owners = [section for section, model in SECTIONS.items() if name in model.model_fields]
        if not owners:
            fields = [field for model in SECTIONS.values() for field in model.model_fields]
            raise UsageError(f"There is no option {name!r}.", _did_you_mean(name, fields))
        if value is not None:
            given[owners[0]][name] = value
    merged: dict[str, Any] = {name: {} for name in SECTIONS}
    for layer in (PRESETS[preset], file, given):
        for section, values in layer.items():
            if section not in SECTIONS or not isinstance(values, Mapping):
                message = f"{section!r} is not a table of options."
                raise UsageError(message, "Tables are [data], [model] and [training].")
            merged[section].update(values)
    try:
        return Config.model_validate({"preset": preset, **merged})
    except ValidationError as error:
        raise _refusal(error) from None


def _did_you_mean(name: str, fields: Iterable[str]) -> str:
    close = nearest(name, fields, 1)
    return f"Did you mean {close[0]!r}?" if close else HELP


def _refusal(error: ValidationError) -> UsageError:
    """The first thing that is wrong, named as the user wrote it."""
    first = error.errors(include_url=False)[0]
    section, name = map(str, first["loc"][:2])
    if first["type"] == "extra_forbidden":
        hint = _did_you_mean(name, SECTIONS[section].model_fields)
        return UsageError(f"There is no option {name!r} in [{section}].", hint)
    # A union such as "a number or 'all'" has an error for each part.
    same = [e["msg"] for e in error.errors(include_url=False) if e["loc"][:2] == first["loc"][:2]]
    reason = " or ".join(dict.fromkeys(message.removeprefix("Input should be ") for message in same))
    return UsageError(f"Option {name} is {first['input']!r}; it must be {reason}.", HELP)


def read_toml(path: Path, opener: Callable[[str, int], int] | None = None) -> dict[str, Any]:
    """Contents of a configuration file, which is refused by `InputError` if it cannot be read or is not TOML."""
    try:
        with open(path, "rb", opener=opener) as handle:
            text = handle.read(MAX_TOML + 1)
        if len(text) > MAX_TOML:
            raise InputError(f"The configuration {path} has more than {MAX_TOML >> 10} KiB.", "Check the path.")
        return tomllib.loads(text.decode())
    except OSError as error:
        raise InputError(f"The configuration {path} cannot be read: {error.strerror}.", "Check the path.") from None
    except (ValueError, RecursionError) as error:
        message = f"The configuration {path} is not TOML: {error}."
        raise InputError(message, "See https://toml.io for the format.") from None


def _toml(value: Any) -> str:
    """JSON strings, numbers, booleans and flat lists are TOML, except for pairs of surrogates and a bare DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def to_toml(config: Config) -> str:
    """The configuration as TOML that `read_toml` and `make_config` take back; unset options are left out."""
    lines = [f"preset = {_toml(config.preset)}"]
    for section in SECTIONS:
        lines.append(f"\n[{section}]")
        values = getattr(config, section).model_dump(mode="json", exclude_none=True)
        lines += [f"{name} = {_toml(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"

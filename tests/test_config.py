"""Configuration: presets, precedence, ranges, TOML round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crlseq.config import PRESETS, SECTIONS, Config, make_config, read_toml, to_toml
from crlseq.errors import InputError, UsageError

names = st.text(st.characters(blacklist_categories=("Cs",)), max_size=8)
shares = st.floats(0, 0.99)
configurations = st.fixed_dictionaries(
    {"preset": st.sampled_from(sorted(PRESETS))},
    optional={
        "perturbation_key": names,
        "control_label": names,
        "separator": names,
        "batch_key": names,
        "layer": names,
        "values": st.sampled_from(["auto", "counts", "log", "continuous"]),
        "n_top_genes": st.one_of(st.just("all"), st.integers(2, 10**6)),
        "genes": st.lists(names, max_size=3).map(tuple),
        "min_cells": st.integers(2, 1000),
        "hold_out": st.lists(names, max_size=3).map(tuple),
        "hold_out_cells": shares,
        "validation_cells": st.floats(1e-9, 0.49),
        "combinations": st.booleans(),
        "n_latents": st.integers(1, 500),
        "mmd_bandwidth": st.one_of(st.just("median"), st.floats(1e-300, 1e300)),
        "mmd_weight": st.floats(0, 1e10),
        "learning_rate": st.floats(1e-300, 1.0),
        "seed": st.integers(0, 2**32 - 1),
        "device": st.sampled_from(["auto", "cpu", "cuda"]),
        "causal_layer": st.booleans(),
    },
)


@given(options=configurations)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_toml_round_trip(options: dict[str, Any], tmp_path: Path) -> None:
    config = make_config(**options)
    (tmp_path / "run.toml").write_text(to_toml(config), encoding="utf-8")
    # What a preset sets to "none" is left out of the file, and comes back with the preset.
    assert make_config(file=read_toml(tmp_path / "run.toml")) == config


@given(options=configurations)
@settings(max_examples=50, deadline=None)
def test_json_round_trip(options: dict[str, Any]) -> None:
    config = make_config(**options)
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_precedence() -> None:
    file = {"preset": "paper", "training": {"seed": 5, "epochs": 7}}
    config = make_config(file=file, epochs=9, n_latents=None)
    assert (config.preset, config.training.seed, config.training.epochs) == ("paper", 5, 9)
    assert config.training.dtype == "float64"
    assert make_config("default", file).training.dtype == "float32"
    assert file == {"preset": "paper", "training": {"seed": 5, "epochs": 7}}  # not changed


def test_paper_is_the_published_model() -> None:
    config = make_config("paper")
    assert (config.model.intervention, config.model.equations, config.model.noise) == ("shift", "linear", "none")
    assert (config.model.mmd_estimator, config.model.mmd_bandwidth, config.model.mmd_kernels) == ("biased", 1000.0, 10)
    assert (config.model.mmd_weight, config.model.kl_weight, config.model.graph_weight) == (10.0, 2.0, 1e-3)
    assert (config.training.epochs, config.training.batch_size, config.training.learning_rate) == (100, 32, 1e-3)
    assert (config.training.dtype, config.training.schedule, config.training.patience) == ("float64", "published", None)
    assert config.model.max_temperature == 5.0
    assert not config.data.combinations


def test_names_are_unique_over_sections() -> None:
    fields = [name for section in SECTIONS.values() for name in section.model_fields]
    assert len(fields) == len(set(fields))


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0}, {"epochs": 1.5}, {"epochs": "x"}, {"learning_rate": 0}, {"learning_rate": float("nan")},
        {"kl_weight": float("inf")}, {"kl_weight": -1}, {"validation_cells": 0.5}, {"validation_cells": 0},
        {"hold_out_cells": 1}, {"min_cells": 1}, {"n_top_genes": 1}, {"n_top_genes": "some"}, {"mmd_bandwidth": 0},
        {"mmd_kernels": 21}, {"method": "linear", "ensemble": 2}, {"preset": "paper", "decoder": "sparse"}, {"seed": 2**32}, {"device": "gpu"}, {"hold_out": "A+B"}, {"wrong": 1}, {"preset": "fast"},
        {"file": {"data": {"wrong": 1}}}, {"file": {"wrong": {}}}, {"file": {"data": [1]}}, {"file": {"preset": ["paper"]}},
    ],
)  # fmt: skip
def test_refusals(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        make_config(**options)
    assert caught.value.message.endswith(".")
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_sentences() -> None:
    def refusal(**options: Any) -> str:
        with pytest.raises(UsageError) as caught:
            make_config(**options)
        return str(caught.value)

    assert (
        refusal(epochs=0)
        == "Option epochs is 0; it must be greater than or equal to 1. See `crlseq fit --help` for the options."
    )
    assert (
        refusal(file={"training": {"epoch": 1}}) == "There is no option 'epoch' in [training]. Did you mean 'epochs'?"
    )
    assert "'all'" in refusal(n_top_genes="most")


def test_configurations_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_config().training.epochs = 3  # type: ignore[misc]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, content in {"a": b"= 3", "b": b"\xff\xfe", "c": b"[" * 10_000}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="is not TOML"):
            read_toml(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        read_toml(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read"):
        read_toml(tmp_path)

# SPDX-License-Identifier: Apache-2.0
"""Configurations: strict keys, strict types, overrides."""

import json
from pathlib import Path

import pytest

from dplip.certify import METHODS
from dplip.config import load_config, parse_config
from dplip.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "experiments" / "configs").glob("*.toml"))


def minimal() -> dict:
    return {
        "data": {"name": "digits"},
        "model": {"kind": "lipschitz_mlp", "widths": [8]},
        "privacy": {"population": 100, "batch_size": 10, "delta": 1e-3, "steps": 5, "epsilon": 3},
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_committed_configurations_load_and_survive_json(path):
    config = load_config(path)
    again = parse_config(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()


def test_defaults_and_integers_for_floats():
    config = parse_config(minimal())
    assert config.privacy.epsilon == 3.0 and isinstance(config.privacy.epsilon, float)
    assert config.model.options == {"widths": [8]}
    assert config.certify.linf == (0.01, 0.03, 0.1, 0.3)
    assert config.certify.l2 == (0.1, 0.25, 0.5, 1.0, 1.58)


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("privacy", "epsilonn", 3, "epsilon"),
        ("optimizer", "learning_rate", 1, "known"),
        ("", "privcy", {}, "privacy"),
        ("privacy", "steps", 2.5, "steps"),
        ("privacy", "steps", True, "steps"),
        ("privacy", "batch_size", 0, "batch_size"),
        ("privacy", "batch_size", 101, "batch_size"),
        ("privacy", "noise_multiplier", 1.0, "epsilon or noise_multiplier"),
        ("privacy", "epochs", 3, "steps or epochs"),
        ("privacy", "noise_gamma", 0.9, "noise_every or noise_milestones"),
        ("privacy", "noise_every", 2, "noise_gamma"),
        ("privacy", "noise_milestones", [1.5], "noise_milestones"),
        ("optimizer", "lr", -1, "optimizer.lr"),
        ("optimizer", "lr", float("nan"), "lr"),
        ("optimizer", "kind", "lbfgs", "optimizer.kind"),
        ("optimizer", "warmup", 0.9, "warmup"),
        ("certify", "linf", [-0.1], "radii"),
        ("certify", "method", "guess", "certify.method"),
        ("loss", "kind", "mse", "loss.kind"),
        ("data", "name", 3, "data.name"),
    ],
)
def test_bad_values_are_refused_by_name(section, key, value, named):
    values = minimal()
    (values.setdefault(section, {}) if section else values)[key] = value
    with pytest.raises(ConfigError, match=named) as caught:
        parse_config(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_every_certificate_method_can_be_asked_for(method):
    assert parse_config(minimal() | {"certify": {"method": method}}).certify.method == method


@pytest.mark.parametrize("missing", ["data", "model", "privacy"])
def test_missing_sections(missing):
    values = minimal()
    del values[missing]
    with pytest.raises(ConfigError, match=missing):
        parse_config(values)


def test_missing_required_key():
    values = minimal()
    del values["privacy"]["delta"]
    with pytest.raises(ConfigError, match=r"privacy\.delta"):
        parse_config(values)


def test_overrides(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        '[data]\nname="digits"\n[model]\nkind="sort_mlp"\ntop_k=4\n'
        "[privacy]\npopulation=100\nbatch_size=10\ndelta=1e-3\nsteps=5\nepsilon=3\n"
    )
    config = load_config(path, ["privacy.epsilon=1.5", "model.widths=[3, 4]", "optimizer.kind=sgd", "seed=7"])
    assert (config.privacy.epsilon, config.model.options["widths"]) == (1.5, [3, 4])
    assert (config.optimizer.kind, config.seed) == ("sgd", 7)
    for bad in (["privacy.epsilon"], ["=3"], ["seed=1", "seed.x=1"], ["privacy.nope=1"]):
        with pytest.raises(ConfigError):
            load_config(path, bad)


@pytest.mark.parametrize("text", ["[data", "data = \x00", ""])
def test_damaged_files(tmp_path, text):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)
    with pytest.raises(ConfigError, match="readable"):
        load_config(tmp_path / "absent.toml")

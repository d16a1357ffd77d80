# SPDX-License-Identifier: Apache-2.0
"""Splines in a private run: their own parameter group, noise by learning rate, the same privacy."""

import math
from pathlib import Path

import pytest

from dplip.config import load_config
from dplip.data import load
from dplip.errors import ConfigError
from dplip.session import prepare

DIGITS = Path(__file__).parents[1] / "experiments" / "configs" / "digits.toml"


def session(*overrides: str):
    options = ["model.activation=spline", "privacy.steps=3", "privacy.noise_multiplier=2.0", *overrides]
    config = load_config(DIGITS, [*options, "insecure_seed=1", "model.widths=[8]"])
    return prepare(config, load("digits"))


@pytest.fixture
def without_target(tmp_path, monkeypatch):
    text = DIGITS.read_text().replace("epsilon = 3.0\n", "")
    (tmp_path / "digits.toml").write_text(text)
    monkeypatch.setattr("tests.test_spline_training.DIGITS", tmp_path / "digits.toml")


@pytest.mark.usefixtures("without_target")
@pytest.mark.parametrize("scaled", ["false", "true"])
def test_slow_splines_take_little_of_the_noise_budget(scaled: str) -> None:
    s = session("optimizer.spline_lr=0.01", f"model.spline_scaled={scaled}")
    names = {n for n, _ in s.model.named_parameters()}
    assert {n for n in names if "coefficients" in n or "scale" in n} == names - {"3.weight", "5.weight"}
    assert [g["lr"] for g in s.optimizer.param_groups][1] == pytest.approx(0.01 * s.optimizer.param_groups[0]["lr"])
    for _ in range(3):
        tensors = s.optimizer.tensors()
        spent = sum((t.bound / sigma) ** 2 for t, sigma in tensors.values() if t.bound > 0)
        assert 1 / math.sqrt(spent) == pytest.approx(2.0, rel=1e-9)
        shares = {n: (t.bound / sigma) ** 2 / spent for n, (t, sigma) in tensors.items() if t.bound > 0}
        assert shares["4.coefficients"] < 0.1
        for x, y in s.loader:
            s.optimizer.zero_grad()
            s.loss(s.model(x), y).backward()
            s.optimizer.step()
            break
        spline = s.model[4]
        assert float(spline.slopes().detach().abs().max()) <= 1 + 1e-5


@pytest.mark.usefixtures("without_target")
def test_rate_zero_freezes_the_function() -> None:
    s = session("optimizer.spline_lr=0.0")
    before = s.model[4].coefficients.detach().clone()
    for x, y in s.loader:
        s.optimizer.zero_grad()
        s.loss(s.model(x), y).backward()
        s.optimizer.step()
        break
    assert float((s.model[4].coefficients.detach() - before).abs().max()) < 1e-5


@pytest.mark.usefixtures("without_target")
def test_negative_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.spline_lr"):
        session("optimizer.spline_lr=-1.0")

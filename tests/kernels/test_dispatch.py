# SPDX-License-Identifier: Apache-2.0
"""Backends are chosen by speed under auto, and never replaced where one was asked for by name."""

import pytest

from dplip.errors import ConfigError
from dplip.kernels import dispatch
from dplip.kernels.dispatch import backends, register, select


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator with a reference, a backend for cuda and one for cpu and cuda."""
    monkeypatch.setattr(dispatch, "_TABLE", {})
    monkeypatch.delenv("DPLIP_KERNELS", raising=False)
    register("op", "reference")(lambda: "reference")
    register("op", "fast", frozenset({"cuda"}))(lambda: "fast")
    register("plain", "reference")(lambda: "plain")


@pytest.mark.usefixtures("table")
def test_the_fastest_that_fits_comes_first() -> None:
    assert backends("op", "cuda") == ["fast", "reference"]
    assert backends("op", "cpu") == ["reference"]
    assert backends("unknown", "cpu") == []
    assert select("op", "cuda")() == "fast"
    assert select("op", "cpu")() == "reference"


@pytest.mark.usefixtures("table")
def test_a_name_is_obeyed_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPLIP_KERNELS", "reference")
    assert select("op", "cuda")() == "reference"
    monkeypatch.setenv("DPLIP_KERNELS", "fast")
    assert select("op", "cuda")() == "fast"
    for operator, device in (("op", "cpu"), ("plain", "cuda")):
        with pytest.raises(ConfigError, match=rf"DPLIP_KERNELS.*{operator} on {device}, got 'fast'"):
            select(operator, device)


@pytest.mark.usefixtures("table")
def test_no_backend_at_all_is_an_error() -> None:
    with pytest.raises(ConfigError, match="unknown on cpu"):
        select("unknown", "cpu")


@pytest.mark.usefixtures("table")
def test_register_returns_the_function() -> None:
    def twice(x: int) -> int:
        return 2 * x

    assert register("op", "twice")(twice) is twice

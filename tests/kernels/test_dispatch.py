# SPDX-License-Identifier: Apache-2.0
"""Backends are chosen by speed under auto, and never replaced where one was asked for by name."""

import subprocess
import sys

import pytest

from dplip.errors import ConfigError
from dplip.kernels import dispatch
from dplip.kernels.dispatch import backends, register, register_triton, select


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


@pytest.mark.usefixtures("table")
def test_triton_runs_on_the_cpu_only_in_its_interpreter_and_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    register_triton("op", "no_such_module", "run")
    assert backends("op", "cuda")[0] == "fast"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select("op", "cpu")() == "reference"
    monkeypatch.setenv("DPLIP_KERNELS", "triton")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):  # imported when first run
        select("op", "cpu")()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="op on cpu, got 'triton'"):
        select("op", "cpu")


@pytest.mark.usefixtures("table")
def test_without_triton_there_is_no_such_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    register_triton("plain", "no_such_module", "run")
    assert backends("plain", "cuda") == ["reference"]


def test_everything_on_a_cpu_works_with_triton_absent() -> None:
    """In a process where importing it fails."""
    program = """
import sys
sys.modules["triton"] = None  # what the import system takes for absent
import torch
from dplip.kernels.dispatch import backends
from dplip.layers import GroupSort, LinearSpline, LinfDistance, SortLinear
net = torch.nn.Sequential(LinfDistance(8, 6, p=8.0), LinearSpline(6), GroupSort(2), SortLinear.geometric(6, 4, 0.3))
x = torch.randn(5, 8, requires_grad=True)
net(x).sum().backward()
assert x.grad.isfinite().all() and x.grad.any()
operators = ("order_statistic", "power_mean", "linear_spline", "group_sort")
assert not any("triton" in backends(operator, "cuda") for operator in operators)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

# SPDX-License-Identifier: Apache-2.0
"""Opacus' own test of grad samplers, which its package ships, run on every layer of ours."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dplip.errors import IncompatibleModelError
from dplip.interop.opacus import prepare
from tests.interop.opacus_zoo import CASES, mixed, trains

harness = pytest.importorskip("opacus.tests.grad_samples.common", reason="this build of Opacus ships no tests")

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

EXPANDABLE = ("Affine", "AffineConv2d", "NormalizedConv2d", "NormalizedLinear")


def check(model: nn.Module, x: torch.Tensor, ew: bool) -> None:
    """Modes hooks, functorch and, if asked for, ew; losses summed and averaged; then an empty batch."""
    test = harness.GradSampleHooks_test()
    test.run_test(x, prepare(model), batch_first=True, ew_compatible=ew)
    test.run_test(x[:0], model, batch_first=True, ew_compatible=False)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("name", [name for name in CASES if trains(name)])
def test_a_layer_alone(name, batch):
    make, shape = CASES[name]
    check(make(), torch.randn(batch, *shape), ew=name.split("-")[0] in EXPANDABLE)


@pytest.mark.parametrize("name", CASES)
def test_a_layer_among_those_of_torch(name):
    shape = CASES[name][1]
    check(mixed(name), torch.randn(5, *shape), ew=name.split("-")[0] in EXPANDABLE or not trains(name))


@pytest.mark.parametrize("name", [n for n in CASES if trains(n) and n.split("-")[0] not in EXPANDABLE])
def test_expanded_weights_are_refused_by_name(name):
    make, shape = CASES[name]
    with pytest.raises(IncompatibleModelError, match="'ew'"):
        check(make(), torch.randn(5, *shape), ew=True)

# SPDX-License-Identifier: Apache-2.0
"""The run-time check finds layers whose rules deny what they do, and models that their trace misses."""

import pytest
import torch
from torch import Tensor, nn

from dplip.bounds import InputDomain, check_independence, trace
from dplip.errors import MixesExamplesError, NoRuleError
from dplip.layers import Abs, LinfDistance, NormalizedLinear, Residual, Scale, SortLinear

DOMAIN = InputDomain((4,), 0.0, 1.0)


def check(model: nn.Module, domain: InputDomain = DOMAIN) -> None:
    check_independence(model, trace(model), domain)


class BatchMean(Abs):
    """Claims to be |x|."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs() - x.abs().mean(0)


class Masked(Abs):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs() * (torch.arange(len(x)) % 2)[:, None]


class Running(Abs):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x.abs()


class Random(Abs):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs() + torch.rand_like(x)


class ByMode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


@pytest.mark.parametrize("domain", [DOMAIN, InputDomain((4,)), InputDomain((4,), -3.0), InputDomain((4,), 0.0, 1e9)])
def test_lawful_models_pass(domain: InputDomain) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        LinfDistance(4, 6), Residual(NormalizedLinear(6, 6)), nn.Tanh(), SortLinear.geometric(6, 3, rho=0.3)
    )
    check(model, domain)
    check(model.double(), domain)


@pytest.mark.parametrize("layer", [BatchMean, Masked, Random])
def test_examples_that_influence_one_another(layer: type[Abs]) -> None:
    with pytest.raises(MixesExamplesError, match="output changes with the other examples"):
        check(nn.Sequential(Scale(2.0), layer()))


def test_buffers_that_are_written_are_named_and_restored() -> None:
    model = nn.Sequential(Scale(2.0), Running())
    with pytest.raises(MixesExamplesError, match=r"buffers \['1\.mean'\]"):
        check(model)
    assert bool((model[1].mean == 0).all())


def test_a_trace_from_another_mode_is_refused() -> None:
    model = ByMode().eval()
    graph = trace(model)
    check_independence(model, graph, DOMAIN)
    with pytest.raises(NoRuleError, match="disagree"):
        check_independence(model.train(), graph, DOMAIN)


def test_a_hook_that_changes_values_is_refused() -> None:
    model = nn.Sequential(Scale(2.0), Abs())
    graph = trace(model)
    handle = model.register_forward_hook(lambda m, args, y: 3 * y)
    with pytest.raises(NoRuleError, match="disagree"):
        check_independence(model, graph, DOMAIN)
    handle.remove()
    check_independence(model, graph, DOMAIN)


def test_random_streams_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check(nn.Sequential(Scale(2.0)))
    assert torch.equal(torch.rand(2), expected)

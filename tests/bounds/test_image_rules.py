# SPDX-License-Identifier: Apache-2.0
"""Bounds of torch's own convolutions and pools: what stands for them computes the same, with the same parameters."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dplip.bounds import InputDomain, check_independence, forward, input_like, lipschitz, sensitivities, trace
from dplip.bounds.rules import module_layer
from dplip.errors import DplipError
from dplip.norms import Norms

MODULES = [
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, bias=False),
    nn.Conv2d(4, 4, 2, dilation=2, padding="valid"),
    nn.MaxPool2d(2),
    nn.MaxPool2d((3, 2), stride=1, padding=(1, 1)),
    nn.AvgPool2d(3, stride=2),
    nn.AvgPool2d(2, padding=1),
    nn.AvgPool2d(2, count_include_pad=False),
]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_the_layer_is_the_module(module: nn.Module) -> None:
    torch.manual_seed(0)
    layer, x = module_layer(module), torch.randn(3, 4, 8, 9)
    torch.testing.assert_close(layer(x), module(x))
    assert {n: id(p) for n, p in layer.named_parameters()} == {n: id(p) for n, p in module.named_parameters()}


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(1, 1, 3, padding="same"),
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(2, return_indices=True),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2, padding=1, count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=1),
        nn.Conv1d(1, 1, 3),
    ],
    ids=str,
)
def test_what_has_no_rule_is_refused(module: nn.Module) -> None:
    with pytest.raises(DplipError):
        trace(nn.Sequential(module, nn.Flatten()))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.conv(x), 2, stride=1)
        x = F.avg_pool2d(torch.relu(x), kernel_size=2, stride=2)
        return self.out(torch.flatten(x, 1))


class Modules(nn.Sequential):
    def __init__(self) -> None:
        pools = nn.MaxPool2d(2, stride=1), nn.ReLU(), nn.AvgPool2d(2)
        super().__init__(nn.Conv2d(1, 4, 3, padding=1), *pools, nn.Flatten(), nn.Linear(36, 3))


def test_functions_and_modules_have_the_same_bounds() -> None:
    torch.manual_seed(0)
    one, other = Functional(), Modules()
    other.load_state_dict(dict(zip(other.state_dict(), one.state_dict().values(), strict=True)))
    domain, found = InputDomain((1, 7, 7), 0.0, 1.0), []
    for model in (one, other):
        graph = trace(model)
        check_independence(model, graph, domain)
        states = forward(graph, domain, input_like(model, domain))
        bounds = sensitivities(graph, states, Norms(3, l1=2.0, l2=2**0.5, linf=1.0))
        found.append((list(bounds.values()), lipschitz(graph, graph.evaluate(input_like(model, domain)))))
    assert found[0] == found[1]
    assert all(0 < b < float("inf") for b in found[0][0])


def test_an_image_too_small_is_refused_by_name() -> None:
    model, domain = nn.Sequential(nn.Conv2d(1, 1, 5), nn.Flatten()), InputDomain((1, 4, 4), 0.0, 1.0)
    with pytest.raises(DplipError, match="as large as"):
        forward(trace(model), domain, input_like(model, domain))

# SPDX-License-Identifier: Apache-2.0
"""l_p-aware weight decay."""

import math

import pytest
import torch
from torch import nn

from dplip.errors import ConfigError
from dplip.layers import LinfDistance, SortLinear
from dplip.recipes import NormDecayAdam, norm_decay_


@pytest.mark.parametrize("p", [2.0, 8.0, 100.0])
def test_decay_follows_the_gradient_of_the_squared_norm(p: float) -> None:
    torch.manual_seed(0)
    w = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(w.norm(p, dim=1).square().sum() / 2, w)
    moved = w.detach().clone()
    norm_decay_(moved, p, 0.1)
    torch.testing.assert_close(moved, w.detach() - 0.1 * gradient)


def test_at_infinity_one_entry_per_row_decays() -> None:
    w = torch.tensor([[1.0, -4.0, 4.0], [0.0, 0.0, 0.0], [-2.0, 1.0, 0.5]])
    norm_decay_(w, math.inf, 0.25)
    assert w.tolist() == [[1.0, -3.0, 4.0], [0.0, 0.0, 0.0], [-1.5, 1.0, 0.5]]


@pytest.mark.parametrize("p", [2.0, 8.0, 1000.0])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_extreme_rows_stay_finite(p: float, size: float) -> None:
    w = size * torch.tensor([[1.0, -0.5, 0.0], [1.0, 1.0, 1.0]])
    before = w.clone()
    norm_decay_(w, p, 0.1)
    assert bool(torch.isfinite(w).all()) and bool((w.abs() <= before.abs()).all())


def test_optimizer_decays_by_kind_and_otherwise_is_adam() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([LinfDistance(5, 3, p=8), SortLinear(5, 3, [1.0]), nn.Linear(2, 2)])
    before = {n: q.detach().clone() for n, q in model.named_parameters()}
    optimizer = NormDecayAdam(model, lr=0.1, weight_decay=0.5)
    for q in model.parameters():
        q.grad = torch.zeros_like(q)
    model[2].bias.grad = None
    with torch.no_grad():
        model[2].bias.fill_(1.0)
    optimizer.step()
    expected = before["0.weight"].clone()
    norm_decay_(expected, 8, 0.05)
    torch.testing.assert_close(model[0].weight.detach(), expected)
    torch.testing.assert_close(model[1].weight.detach(), 0.95 * before["1.weight"])
    torch.testing.assert_close(model[2].weight.detach(), 0.95 * before["2.weight"])
    assert model[2].bias.tolist() == [1.0, 1.0]  # no gradient, no decay

    exempt = NormDecayAdam(model, lr=0.1, weight_decay=0.5, decay_distances=False)
    kept = model[0].weight.detach().clone()
    exempt.step()
    assert torch.equal(model[0].weight.detach(), kept)

    twins = [LinfDistance(5, 3), LinfDistance(5, 3)]
    twins[1].load_state_dict(twins[0].state_dict())
    ours, adam = (
        NormDecayAdam(twins[0], weight_decay=0.0),
        torch.optim.Adam(twins[1].parameters(), 0.02, (0.9, 0.99), 1e-10),
    )
    for _ in range(3):
        for twin, opt in zip(twins, (ours, adam), strict=True):
            opt.zero_grad()
            twin(torch.ones(2, 5)).sum().backward()
            opt.step()
    assert torch.equal(twins[0].weight, twins[1].weight)


def test_state_dict_is_plain_and_negative_decay_is_refused() -> None:
    model = LinfDistance(5, 3)
    state = NormDecayAdam(model).state_dict()
    assert all(isinstance(v, (int, float, bool, tuple, list, type(None))) for v in state["param_groups"][0].values())
    with pytest.raises(ConfigError):
        NormDecayAdam(model, weight_decay=-1.0)

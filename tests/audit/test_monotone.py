# SPDX-License-Identifier: Apache-2.0
"""The search for monotonicity violations finds narrow ones, stays in its domain and leaves the model alone."""

import pytest
import torch
from torch import Tensor, nn

from dplip.audit.monotone import monotone_violations
from dplip.errors import ConfigError


class Dent(nn.Module):
    """Rises with slope 1 but for a dent of width 0.1 around 0.7 in the first input, where it falls."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] - 3 * torch.relu(0.05 - (x[:, :1] - 0.7).abs()) + x[:, 1:]


def test_a_dent_is_found() -> None:
    attack = monotone_violations(Dent(), torch.tensor([1, 1]), torch.rand(30, 2))
    dented = attack.feature == 0
    assert float(attack.descent[dented].max()) == pytest.approx(0.1, abs=0.02)  # falls 2 per unit over 0.05
    assert float(attack.descent[~dented].max()) < 0
    worst = int(attack.descent.argmax())
    x = attack.x[worst : worst + 1]
    moved = x.clone()
    moved[0, 0] += attack.step[worst]
    assert float(Dent()(x) - Dent()(moved)) == pytest.approx(float(attack.descent[worst]), abs=1e-9)


def test_pairs_stay_in_the_domain() -> None:
    low, high = torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 5.0])
    attack = monotone_violations(Dent(), torch.tensor([-1, 1]), 9 * torch.randn(20, 2), domain=(low, high), steps=10)
    at = torch.arange(len(attack.x))
    assert bool(((attack.x >= low) & (attack.x <= high)).all())
    assert bool((attack.x[at, attack.feature] + attack.step <= high[attack.feature] + 1e-9).all())
    assert bool((attack.step > 0).all())
    assert attack.violations() == 20  # the first input rises, against what was asked


def test_the_model_is_left_alone() -> None:
    model = nn.Linear(2, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    monotone_violations(model, torch.tensor([1, 0]), torch.rand(2, 2), steps=3)
    assert all(torch.equal(v, before[k]) and v.dtype == torch.float32 for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_nothing_to_search_is_refused() -> None:
    for directions, domain in ((torch.tensor([0, 0]), (0.0, 1.0)), (torch.tensor([1, 0]), (1.0, 1.0))):
        with pytest.raises(ConfigError):
            monotone_violations(Dent(), directions, torch.rand(2, 2), domain=domain)

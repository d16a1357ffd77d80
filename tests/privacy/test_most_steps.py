# SPDX-License-Identifier: Apache-2.0
"""A budget becomes the largest number of steps within it."""

import pytest

from dplip.errors import PlanError
from dplip.losses import CrossEntropy
from dplip.privacy import AdaptiveLogitClip
from tests.privacy.toy import attach, net, plan


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_one_more_step_would_exceed_the_budget(accountant: str) -> None:
    p = plan(accountant=accountant)
    most = p.most_steps(3.0)
    assert most >= 1
    assert p.epsilon(most) <= 3.0 < p.epsilon(most + 1)
    assert p.most_epochs(3.0) == most // 5


def test_an_adaptive_clip_is_in_the_budget_from_the_start() -> None:
    """Planning after the clip was attached gives the same number: its cost is inside every step."""
    before = plan(noise_multiplier=2.0).most_steps(2.0)
    _, optimizer = attach(net(), loss=AdaptiveLogitClip(CrossEntropy(), 1.0), noise_multiplier=2.0, steps=before)
    assert optimizer.plan.most_steps(2.0) == before
    assert optimizer.plan.epsilon() <= 2.0


def test_a_budget_too_small_for_one_step_gives_none() -> None:
    assert plan(noise_multiplier=0.3).most_steps(0.01) == 0


def test_without_budget_or_noise_it_refuses() -> None:
    with pytest.raises(PlanError, match="most_steps"):
        plan().most_steps()
    with pytest.raises(PlanError, match="most_steps"):
        plan(noise_multiplier=0.0).most_steps(1.0)
    with pytest.raises(PlanError):
        plan().most_steps(-1.0)

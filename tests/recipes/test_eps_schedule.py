# SPDX-License-Identifier: Apache-2.0
"""Warm-up of the trained radius."""

import math

import pytest

from dplip.errors import ConfigError
from dplip.recipes import EpsSchedule


def test_linear_values() -> None:
    schedule = EpsSchedule(0.4, begin=10, finish=50)
    assert [schedule.at(t) for t in (0, 10, 20, 50, 99)] == pytest.approx([0, 0, 0.1, 0.4, 0.4])
    assert EpsSchedule(0.4, 5, 5).at(0) == 0.4


def test_smooth_start_meets_the_line_in_value_and_slope() -> None:
    schedule, h = EpsSchedule(1.0, smooth=0.25), 1e-6
    k = 1 / ((4 - 0.75) * 0.25**3)
    assert schedule.at(0.1) == pytest.approx(k * 1e-4)
    assert schedule.at(0.25) == pytest.approx(k * 0.25**4)
    slopes = [(schedule.at(r + h) - schedule.at(r)) / h for r in (0.25 - 2 * h, 0.25, 0.8)]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-4)
    assert slopes[1] == pytest.approx(slopes[2], rel=1e-4)
    assert schedule.at(1.0) == pytest.approx(1.0)


@pytest.mark.parametrize(("target", "smooth"), [(-1, 0), (math.inf, 0), (1, 1.0), (1, -0.1)])
def test_options_out_of_range(target: float, smooth: float) -> None:
    with pytest.raises(ConfigError):
        EpsSchedule(target, smooth=smooth)

# SPDX-License-Identifier: Apache-2.0
"""Released centres and scales: right without much noise, and no example moves a release further than claimed."""

import math

import pytest
import torch

from accountants import PldAccountant
from dplip.errors import DataError, PlanError
from dplip.privacy import NoiseSource, PrivateStandardizer


class Recorder(NoiseSource):
    """Keeps what is about to be released and the noise it would get, and adds none."""

    def __init__(self) -> None:
        super().__init__(insecure_seed=0)
        self.sums: list[torch.Tensor] = []
        self.sigmas: list[float] = []

    def add_(self, tensor: torch.Tensor, sigma: float) -> torch.Tensor:
        self.sums.append(tensor.clone())
        self.sigmas.append(sigma)
        return tensor


@pytest.mark.parametrize("columns", [1, 7])
def test_no_example_moves_a_release_by_more_than_its_noise_is_made_for(columns: int) -> None:
    """Removing an extreme example: noise over the move is at least the multiplier, and equal at the worst."""
    x = torch.randn(30, columns).double()
    y = torch.ones(30)
    for extreme in (0.0, 1e9, -1e9, 1.0, 1e-30):
        x[0] = extreme
        with_it, without = Recorder(), Recorder()
        PrivateStandardizer.release(x, y, 2.0, with_it)
        reach = PrivateStandardizer.release(x[1:], y[1:], 2.0, without).reach
        same = PrivateStandardizer.release(x, y, 2.0, Recorder()).reach
        moves = [float((a - b).norm()) for a, b in zip(with_it.sums, without.sums, strict=True)]
        assert moves[0] * 2.0 == pytest.approx(with_it.sigmas[0])
        if torch.equal(reach, same):  # the second release is conditional on the first
            assert moves[1] * 2.0 <= with_it.sigmas[1] * (1 + 1e-12)
            if abs(extreme) > 1e8:
                assert moves[1] * 2.0 == pytest.approx(with_it.sigmas[1])


def test_columns_come_out_standard_whatever_their_scale() -> None:
    torch.manual_seed(0)
    x = torch.randn(20000, 4).double() * torch.tensor([1e-3, 1.0, 30.0, 1e4]) + torch.tensor([0.0, 0.5, -20.0, 2e4])
    scaling = PrivateStandardizer.release(x, (torch.arange(20000) % 5 == 0).float(), 3.0, NoiseSource(insecure_seed=1))
    z = scaling(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(4).double(), atol=0.1, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(4).double(), atol=0.15, rtol=0)
    assert scaling.positive_rate == pytest.approx(0.2, abs=0.01)
    assert scaling.size == pytest.approx(20000, rel=0.01)


def test_a_few_outliers_do_not_set_the_scale() -> None:
    x = torch.randn(5000, 1).double()
    x[:20] = 1e6
    assert float(PrivateStandardizer.release(x, torch.zeros(5000), 2.0, NoiseSource(insecure_seed=0)).reach) <= 4


def test_the_event_is_two_gaussians() -> None:
    spent = PldAccountant().compose(PrivateStandardizer.event_for(10.0)).epsilon(1e-5)
    single = PldAccountant().compose(PrivateStandardizer.event_for(10.0 * math.sqrt(2))).epsilon(1e-5)
    assert single < spent < 2 * single


def test_constant_and_empty_columns_stay_finite() -> None:
    for x in (torch.zeros(50, 2), torch.full((50, 2), 3.0), torch.zeros(0, 2)):
        scaling = PrivateStandardizer.release(x, torch.zeros(len(x)), 5.0, NoiseSource(insecure_seed=2))
        assert torch.isfinite(scaling(torch.ones(3, 2))).all()


def test_bad_input_is_refused() -> None:
    noise = NoiseSource(insecure_seed=0)
    for x, y in (
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(3, 1), torch.zeros(2)),
        (torch.zeros(3, 1), -torch.ones(3)),
    ):
        with pytest.raises(DataError, match="standardizer: expected"):
            PrivateStandardizer.release(x, y, 1.0, noise)
    with pytest.raises(DataError, match="finite"):
        PrivateStandardizer.release(torch.tensor([[math.nan]]), torch.zeros(1), 1.0, noise)
    with pytest.raises(PlanError, match="noise_multiplier"):
        PrivateStandardizer.release(torch.zeros(3, 1), torch.zeros(3), 0.0, noise)

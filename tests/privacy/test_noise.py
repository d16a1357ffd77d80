# SPDX-License-Identifier: Apache-2.0
"""Noise is normal, its own, never repeated, and as wide in the tails as the proof says."""

import numpy as np
import pytest
import torch
from scipy import stats

from dplip.errors import PlanError
from dplip.privacy.noise import NoiseSource, derived_seed, fresh_seed, host_stream


def draw(source: NoiseSource, n: int = 64, sigma: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return source.add_(torch.zeros(n, dtype=dtype), sigma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [1e-3, 1.0, 25.0])
def test_noise_is_normal_with_the_given_deviation(sigma: float, dtype: torch.dtype) -> None:
    n = 200_000
    noise = draw(NoiseSource(insecure_seed=1), n, sigma, dtype).double().numpy() / sigma
    assert noise.std() == pytest.approx(1.0, abs=5 / np.sqrt(2 * n))
    assert noise.mean() == pytest.approx(0.0, abs=5 / np.sqrt(n))
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 5 / np.sqrt(n)


def test_noise_is_added_in_place_once_per_entry() -> None:
    tensor = torch.full((3, 4, 5), 7.0)
    returned = NoiseSource(insecure_seed=2).add_(tensor, 0.5)
    assert returned is tensor and tensor.unique().numel() == 60
    assert float((tensor - 7).abs().amax()) < 4


def test_every_shape_and_layout_gets_noise() -> None:
    source = NoiseSource(insecure_seed=3)
    for tensor in (torch.zeros(()), torch.zeros(0), torch.zeros(4, 6).T, torch.zeros(2, 3, 4, 4)[:, :, ::2]):
        noisy = source.add_(tensor.clone(memory_format=torch.preserve_format), 1.0)
        assert noisy.shape == tensor.shape and bool((noisy != 0).all())
    view = torch.zeros(4, 6).T
    source.add_(view, 1.0)
    assert view.unique().numel() == 24


def test_float32_noise_is_the_float64_draw_rounded_once() -> None:
    exact = draw(NoiseSource(insecure_seed=4), 1000)
    rounded = draw(NoiseSource(insecure_seed=4), 1000, dtype=torch.float32)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, exact.float())
    base = 100 * torch.rand(1000)
    noisy = NoiseSource(insecure_seed=4).add_(base.clone(), 0.3)
    assert torch.equal(noisy, (base.double() + 0.3 * exact).float())


def test_tails_are_not_cut() -> None:
    source, passed = NoiseSource(insecure_seed=5), 0
    for _ in range(10):
        passed += int((draw(source, 1_000_000).abs() > 4.9).sum())
    expected = 10e6 * 2 * stats.norm.sf(4.9)
    assert abs(passed - expected) < 5 * np.sqrt(expected)


def test_global_generators_are_untouched() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for seed in (None, 3):
        source = NoiseSource(insecure_seed=seed)
        draw(source)
        source.continue_from(4)
        draw(source)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_global_seed_does_not_fix_the_noise() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append(draw(NoiseSource()))
    assert not torch.equal(*drawn)


def test_two_sources_differ_and_one_never_repeats() -> None:
    a, b = NoiseSource(), NoiseSource()
    draws = torch.cat([draw(a), draw(b), draw(a), draw(b)])
    assert draws.unique().numel() == draws.numel()


def test_fixed_seed_repeats_and_all_its_bits_count() -> None:
    assert torch.equal(draw(NoiseSource(insecure_seed=9)), draw(NoiseSource(insecure_seed=9)))
    seeds = [0, 1, -1, 2**31, 2**32, 2**32 + 1, 2**64, 2**64 + 1]
    firsts = {float(draw(NoiseSource(insecure_seed=s), 1)) for s in seeds}
    assert len(firsts) == len(seeds)
    assert fresh_seed().bit_length() > 64  # fails once in 2^63 runs


@pytest.mark.parametrize("seed", [None, 11])
def test_continued_stream_matches_nothing_earlier(seed: int | None) -> None:
    source = NoiseSource(insecure_seed=seed)
    seen = [draw(source, 500)]
    for steps in (1, 2, 3, 500):
        source.continue_from(steps)
        seen.append(draw(source, 500))
    values = torch.cat(seen)
    assert values.unique().numel() == values.numel()


def test_continued_stream_is_reproducible_under_a_fixed_seed() -> None:
    a, b = NoiseSource(insecure_seed=1), NoiseSource(insecure_seed=1)
    draw(a, 10)
    for source in (a, b):
        source.continue_from(6)
    assert torch.equal(draw(a), draw(b))


def test_streams_of_different_names_differ() -> None:
    for steps in range(4):
        noise, sampling = (host_stream(1, name, steps).random(100) for name in ("noise", "sampling"))
        assert not np.isin(noise, sampling).any()
    assert len({derived_seed(s, n, k) for s in range(3) for n in ("noise", "sampling") for k in range(3)}) == 18


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_refused(dtype: torch.dtype) -> None:
    tensor = torch.ones(4, dtype=dtype)
    with pytest.raises(PlanError, match="float32"):
        NoiseSource().add_(tensor, 1.0)
    assert bool((tensor == 1).all())


def test_sigma_zero_changes_nothing() -> None:
    tensor = torch.randn(5)
    before = tensor.clone()
    assert torch.equal(NoiseSource().add_(tensor, 0.0), before)


@pytest.mark.gpu
def test_noise_on_a_gpu_is_normal_and_float64_wide() -> None:
    source = NoiseSource("cuda", insecure_seed=1)
    noise = source.add_(torch.zeros(200_000, device="cuda"), 2.0)
    assert noise.is_cuda and stats.kstest(noise.cpu().numpy() / 2, "norm").pvalue > 1e-3
    again = NoiseSource("cuda", insecure_seed=1).add_(torch.zeros(200_000, device="cuda"), 2.0)
    assert torch.equal(noise, again)
    source.continue_from(3)
    assert not torch.isin(source.add_(torch.zeros(1000, device="cuda"), 2.0), noise).all()

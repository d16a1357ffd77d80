# SPDX-License-Identifier: Apache-2.0
"""Noise is normal, its own, never repeated, and as wide in the tails as the proof says."""

import copy
import os
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from dplip.errors import PlanError
from dplip.privacy import normals
from dplip.privacy.noise import NoiseSource, derived_seed, fresh_seed, host_stream
from dplip.privacy.normals import Normals


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_release_is_one_draw_over_all_tensors_with_each_its_own_deviation(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normals, "_PAIRS", 50)  # blocks end inside tensors and tensors inside blocks
    shapes = [(3, 5), (), (0,), (40, 11), (1,), (7, 9, 2)]
    sums = [torch.rand(shape, dtype=dtype) for shape in shapes]
    sums[3] = torch.rand(11, 40, dtype=dtype).T  # not contiguous
    sigmas = [0.5, 2.0, 1.0, 3.0, 0.0, 4.0]
    before = [s.double().clone() for s in sums]
    NoiseSource(insecure_seed=8).release_(sums, sigmas, 7.0)
    n = sum(s.numel() for s, sigma in zip(sums, sigmas, strict=True) if sigma)
    flat = Normals(derived_seed(8, "noise", 0)).fill_(torch.empty(n, dtype=torch.float64))
    start = 0
    for got, was, sigma in zip(sums, before, sigmas, strict=True):
        end = start + (got.numel() if sigma else 0)
        noise = flat[start:end].view(got.shape) if sigma else torch.zeros(got.shape)
        torch.testing.assert_close(got, ((was + sigma * noise) / 7).to(dtype), rtol=1e-6, atol=0)
        start = end


def test_release_refuses_before_it_changes_anything() -> None:
    sums = [torch.ones(3), torch.ones(3, dtype=torch.bfloat16)]
    with pytest.raises(PlanError, match="float32"):
        NoiseSource().release_(sums, [1.0, 1.0])
    assert bool((sums[0] == 1).all())


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_draw_noise_of_their_own(clone: Callable[[NoiseSource], NoiseSource]) -> None:
    source = NoiseSource()
    draw(source)
    other = clone(source)
    values = torch.cat([draw(source), draw(other), draw(clone(source)), draw(source), draw(other)])
    assert values.unique().numel() == values.numel()
    fixed = NoiseSource(insecure_seed=3)
    assert torch.equal(draw(clone(fixed)), draw(fixed))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_draw_noise_of_their_own() -> None:
    source = NoiseSource()
    draw(source)
    drawn = []
    for _ in range(2):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's threads are idle here
            child = os.fork()
        if child == 0:
            os.write(writer, draw(source).numpy().tobytes())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            drawn.append(torch.from_numpy(np.frombuffer(pipe.read(), np.float64).copy()))
        os.waitpid(child, 0)
    values = torch.cat([*drawn, draw(source)])
    assert values.numel() == 3 * 64 and values.unique().numel() == values.numel()


@pytest.mark.gpu
def test_noise_on_a_gpu_is_normal_and_float64_wide() -> None:
    source = NoiseSource("cuda", insecure_seed=1)
    noise = source.add_(torch.zeros(200_000, device="cuda"), 2.0)
    assert noise.is_cuda and stats.kstest(noise.cpu().numpy() / 2, "norm").pvalue > 1e-3
    again = NoiseSource("cuda", insecure_seed=1).add_(torch.zeros(200_000, device="cuda"), 2.0)
    assert torch.equal(noise, again)
    source.continue_from(3)
    assert not torch.isin(source.add_(torch.zeros(1000, device="cuda"), 2.0), noise).all()

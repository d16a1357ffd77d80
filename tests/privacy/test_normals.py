# SPDX-License-Identifier: Apache-2.0
"""Normals are normal far into the tails, independent, and fixed by key, draw and position alone."""

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from dplip.privacy import normals
from dplip.privacy.normals import Normals


def draw(source: Normals, n: int) -> torch.Tensor:
    return source.fill_(torch.full((n,), float("nan"), dtype=torch.float64))


def test_distribution() -> None:
    n = 4_000_000
    x = draw(Normals(1), n).numpy()
    assert stats.kstest(x, "norm").pvalue > 1e-3
    for k in range(1, 9):
        exact = 0.0 if k % 2 else float(np.prod(np.arange(1, k, 2)))
        spread = np.sqrt((np.prod(np.arange(1.0, 2 * k, 2)) - exact**2) / n)
        assert abs((x**k).mean() - exact) < 5 * spread
    counts = np.histogram(stats.norm.cdf(x), 4096, (0, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_the_two_of_a_pair_and_neighbours_are_independent() -> None:
    n = 1_000_000
    x = draw(Normals(2), n).numpy()
    first, second = x[: n // 2], x[n // 2 :]
    for a, b in ((first, second), (first[1:], first[:-1]), (second[1:], first[:-1])):
        for f in (np.asarray, np.abs, np.square, np.sign):
            assert abs(np.corrcoef(f(a), f(b))[0, 1]) < 5 / np.sqrt(n / 2)
    angles = np.histogram(np.arctan2(second, first), 1000, (-np.pi, np.pi))[0]
    assert stats.chisquare(angles).pvalue > 1e-3


@pytest.mark.parametrize("n", [0, 1, 2, 3, 999, 1000, 200_001])
def test_every_position_is_filled_once(n: int) -> None:
    seen = torch.zeros(n, dtype=torch.int64)
    for start, block in Normals(3).blocks(n):
        seen[start : start + block.numel()] += 1
        assert torch.isfinite(block).all()
    assert (seen == 1).all()
    assert draw(Normals(3), n).unique().numel() == n


@pytest.mark.parametrize(("n", "pairs", "threads"), [(2001, 7, 1), (150_001, 1000, 1), (150_001, 1 << 20, 2)])
def test_sequence_depends_on_neither_block_length_nor_threads(
    n: int, pairs: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, before = draw(Normals(4), n), torch.get_num_threads()
    monkeypatch.setattr(normals, "_PAIRS", pairs)
    try:
        torch.set_num_threads(threads)
        torch.testing.assert_close(draw(Normals(4), n), expected, rtol=1e-14, atol=1e-15)
    finally:
        torch.set_num_threads(before)


def test_formula_from_the_cipher() -> None:
    """The words of a draw are AES in counter mode under (draw, purpose, position), and nothing else enters."""
    key, n = 0x0123456789ABCDEF0123456789ABCDEF, 10
    source = Normals(key)
    draw(source, 3)
    got = draw(source, n).numpy()  # draw number 1

    def words(purpose: int) -> np.ndarray:
        counter = (1).to_bytes(6, "big") + purpose.to_bytes(2, "big") + bytes(8)
        cipher = Cipher(algorithms.AES(key.to_bytes(16, "big")), modes.CTR(counter)).encryptor()
        return np.frombuffer(cipher.update(bytes(8 * n // 2)), np.int64).astype(np.float64)

    r = np.sqrt(-2 * np.log(0.5 + words(0) * 2.0**-64))
    a = words(1) * (np.pi * 2.0**-63)
    np.testing.assert_allclose(got, np.concatenate([r * np.cos(a), r * np.sin(a)]), rtol=1e-12)


def test_draws_and_keys_share_nothing() -> None:
    source = Normals(5)
    values = torch.cat([*(draw(source, 1000) for _ in range(20)), draw(Normals(6), 1000)])
    assert values.unique().numel() == values.numel()


def test_abandoned_draw_is_not_taken_up_again() -> None:
    source, twin = Normals(7), Normals(7)
    abandoned = next(source.blocks(100))[1].clone()
    assert not torch.isin(draw(source, 100), abandoned).any()
    draw(twin, 100)
    assert torch.equal(draw(Normals(7), 100)[:50], abandoned)
    assert torch.equal(draw(source, 10), draw(_after(Normals(7), 2), 10))


def _after(source: Normals, draws: int) -> Normals:
    for _ in range(draws):
        draw(source, 1)
    return source


def test_further_bits_keep_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rare branch, taken for every number, leaves it normal and moves u by less than its rounding."""
    before = draw(Normals(8), 1_000_000)
    monkeypatch.setattr(normals, "_SMALL", 2.0)
    after = draw(Normals(8), 1_000_000)
    assert stats.kstest(after.numpy(), "norm").pvalue > 1e-3
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-6)


def test_smallest_numbers_are_uniform_and_never_zero() -> None:
    cipher = Normals(9)._words(0, 2)
    u = torch.zeros(100_000, dtype=torch.float64)
    u[1::2] = 2.0**-54
    normals._extend(u, cipher)
    assert (u > 0).all()
    assert stats.kstest(u[::2].numpy() * 2.0**55, "uniform").pvalue > 1e-3
    assert stats.kstest(u[1::2].numpy() * 2.0**54 - 0.5, "uniform").pvalue > 1e-3
    kept = torch.tensor([0.5, 2.0**-20, 1.0], dtype=torch.float64)
    normals._extend(kept, cipher)
    assert kept.tolist() == [0.5, 2.0**-20, 1.0]
    reach = np.sqrt(-2 * np.log(2.0**-108))
    assert reach > 12


def test_default_device_and_inference_do_not_matter() -> None:
    expected = draw(Normals(10), 100)
    with torch.device("meta"):
        drawn = [block for _, block in Normals(10).blocks(100)]
    assert torch.equal(torch.cat(drawn), expected)
    with torch.inference_mode():
        assert torch.equal(draw(Normals(10), 100), expected)

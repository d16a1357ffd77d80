# SPDX-License-Identifier: Apache-2.0
"""Reduces a ledger to its basic mechanisms, exactly: the form in which every accountant reads it.

Basic mechanisms are ``Gaussian``, ``PoissonSampled(Gaussian)`` with 0 < q < 1 and
``TruncatedPoissonSampled(Gaussian)`` whose batch limit can bind. The reductions used, all equalities:

* Gaussians on the same data compose to one, ``1/z^2 = sum 1/z_k^2`` (``Gaussian.joint``); inside a sampled
  event that means the same draw, outside it the whole data set;
* sampling with q = 1 is no sampling, with q = 0 no release;
* a batch limit of at least the data set's size never binds.

Types are matched exactly: a subclass may mean something else, so it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from accountants.base import UnsupportedEvent
from accountants.events import Event, Gaussian, PoissonSampled, Repeat, Sequence, TruncatedPoissonSampled


def basic_mechanisms(ledger: Iterable[tuple[Event, int]]) -> dict[Event, int]:
    """Basic mechanism -> how often it runs; all unsampled Gaussians are merged into one.

    Raises:
        UnsupportedEvent: an event that no reduction covers.
    """
    counts: dict[Event, int] = {}
    gaussians: list[tuple[float, int]] = []
    for event, count in ledger:
        for mechanism, times in _reduce(event, count):
            if isinstance(mechanism, Gaussian):
                gaussians.append((mechanism.noise_multiplier, times))
            else:
                counts[mechanism] = counts.get(mechanism, 0) + times
    if gaussians:
        counts[Gaussian(_joint(gaussians))] = 1
    return counts


def noise_multiplier(mechanism: Event) -> float:
    """The multiplier of a basic mechanism."""
    match mechanism:
        case Gaussian(noise_multiplier=z):
            return z
        case PoissonSampled(event=Gaussian(noise_multiplier=z)):
            return z
        case TruncatedPoissonSampled(event=Gaussian(noise_multiplier=z)):
            return z
    raise UnsupportedEvent(f"noise_multiplier: expected a basic mechanism, got {mechanism!r}")


def _joint(multipliers: Iterable[tuple[float, int]]) -> float:
    """``(sum_k n_k / z_k^2)^(-1/2)``, scaled so that extreme multipliers neither overflow nor vanish."""
    pairs = list(multipliers)
    smallest = min(z for z, _ in pairs)
    if smallest == 0.0:
        return 0.0
    return smallest / math.sqrt(math.fsum(n * (smallest / z) ** 2 for z, n in pairs))


_EXACT = frozenset({Gaussian, PoissonSampled, TruncatedPoissonSampled, Repeat, Sequence})


def _require_known(event: Event) -> None:
    if type(event) not in _EXACT:
        raise UnsupportedEvent(f"expected one of {sorted(c.__name__ for c in _EXACT)}, got {event!r}")


def _reduce(event: Event, count: int) -> Iterator[tuple[Event, int]]:
    _require_known(event)
    match event:
        case Gaussian():
            yield event, count
        case Repeat(event=inner, count=times):
            yield from _reduce(inner, count * times)
        case Sequence(events=inners):
            for inner in inners:
                yield from _reduce(inner, count)
        case PoissonSampled(event=inner, sampling_prob=q):
            yield from _sampled(inner, q, count)
        case TruncatedPoissonSampled(event=inner, sampling_prob=q, dataset_size=n, max_batch_size=limit):
            if limit >= n:
                yield from _sampled(inner, q, count)
            else:
                releases = list(_same_draw(inner, 1))
                if releases and q > 0.0:
                    yield TruncatedPoissonSampled(Gaussian(_joint(releases)), q, n, limit), count


def _sampled(inner: Event, q: float, count: int) -> Iterator[tuple[Event, int]]:
    releases = list(_same_draw(inner, 1))
    if not releases or q == 0.0:
        return
    gaussian = Gaussian(_joint(releases))
    yield (gaussian if q == 1.0 else PoissonSampled(gaussian, q)), count


def _same_draw(event: Event, count: int) -> Iterator[tuple[float, int]]:
    """The Gaussians released on one draw; sampling a sampled event again is not reduced, so it is refused."""
    _require_known(event)
    match event:
        case Gaussian(noise_multiplier=z):
            yield z, count
        case Repeat(event=inner, count=times):
            yield from _same_draw(inner, count * times)
        case Sequence(events=inners):
            for inner in inners:
                yield from _same_draw(inner, count)
        case _:
            raise UnsupportedEvent(f"inside a sampled event expected Gaussians only, got {event!r}")

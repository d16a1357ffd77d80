# SPDX-License-Identifier: Apache-2.0
"""The spacing of the privacy-loss grid: fine enough to be tight, coarse enough to be quick.

Any spacing gives an upper bound, since connecting the dots lies above the convex curve it joins (Doroshenko
et al., PoPETs 2022, Algorithm 1), so only tightness and time depend on the choice. Spacings are ``base *
2^j``: each is a subset of the next finer one, and for more mechanisms or more repetitions the choice never
gets finer, so a longer ledger is never discretised more favourably than a shorter one.
"""

from __future__ import annotations

import math

from accountants.events import Event, Gaussian, TruncatedPoissonSampled
from accountants.mechanisms import noise_multiplier

BASE_INTERVAL = 2e-4
_FINEST = 6  # base / 64: below that, rounding errors of the probabilities (about 1e-16 / spacing) start to show
_CELLS_PER_DEVIATION = 16.0  # a loss of standard deviation s on a grid of s / 16: variance inflated by about 0.2 %
_MOST_SINGLE = 2**20  # grid points of all the single-step distributions together
_MOST_COMPOSED = 2**21  # grid points of the composed distribution
_WIDEST = 1.0
_TAIL_DEVIATIONS = 10.4  # quantile of exp(-50), where dp-accounting cuts the noise, plus a little


def grid_interval(mechanisms: dict[Event, int], *, replace_one: bool, base: float = BASE_INTERVAL) -> float | None:
    """Spacing in units of epsilon, or None when losses are too large for any useful grid."""
    widest = deviation = coarsest_need = 0.0
    for mechanism, count in mechanisms.items():
        span, step = _loss_scale(mechanism, replace_one)
        if not (math.isfinite(span) and math.isfinite(step)):
            return None
        widest, coarsest_need = max(widest, span), max(coarsest_need, step)
        deviation += count * step**2
    # A coarser base coarsens this requirement too: whoever asks for it wants speed everywhere.
    halvings = math.ceil(math.log2(max(BASE_INTERVAL * _CELLS_PER_DEVIATION / coarsest_need, 1.0)))
    interval = base / 2.0 ** min(_FINEST, halvings)
    composed = widest + 20.0 * math.sqrt(deviation)
    single = widest * min(len(mechanisms), 128)
    while interval <= _WIDEST:
        if single <= _MOST_SINGLE * interval and composed <= _MOST_COMPOSED * interval:
            return interval
        interval *= 2.0
    return None


def _loss_scale(mechanism: Event, replace_one: bool) -> tuple[float, float]:
    """(span of the privacy loss, its standard deviation) of one step, roughly; never zero."""
    z = noise_multiplier(mechanism) / (2.0 if replace_one else 1.0)
    q = 1.0 if isinstance(mechanism, Gaussian) else float(getattr(mechanism, "sampling_prob", 1.0))
    if isinstance(mechanism, TruncatedPoissonSampled):
        span, _ = _sampled_scale(z / 4.0, q)
        return span, _sampled_scale(z, q)[1]
    return _sampled_scale(z, q)


def _sampled_scale(z: float, q: float) -> tuple[float, float]:
    inverse = 1.0 / z
    top = (_TAIL_DEVIATIONS + 0.5 * inverse) * inverse
    if q >= 1.0:
        return 2.0 * top, inverse
    upper = math.log1p(q * math.expm1(top)) if top < 700.0 else max(top + math.log(q), 1.0)
    lower = min(top, -math.log1p(-q))
    variance = q * inverse**2 * (1.0 + 0.25 * inverse**2)
    if inverse < 5.0:
        variance = min(variance, q**2 * math.expm1(inverse**2))
    return upper + lower, max(math.sqrt(variance), 1e-300)

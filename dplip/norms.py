# SPDX-License-Identifier: Apache-2.0
"""Norm states, operator norms, and the only place where one norm is exchanged for another.

Everything dplip proves is carried by two small records. :class:`Norms` bounds one vector in l_1, l_2 and
l_inf at once; :class:`OperatorNorms` bounds every Jacobian of a layer in five operator norms. By duality,
``||J^T||_{b'->a'} = ||J||_{a->b}``, the same five numbers move a perturbation forward (Lipschitz constants,
certificates) and a cotangent backward (per-example gradients, privacy noise).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields

__all__ = ["Norms", "OperatorNorms"]


@dataclass(frozen=True, slots=True)
class Norms:
    """``||v||_1 <= l1``, ``||v||_2 <= l2`` and ``||v||_inf <= linf`` for a vector ``v`` of ``dim`` entries.

    The record is closed on construction: each bound is replaced by the best that the other two imply,
    through ``linf <= l2 <= l1``, ``l1 <= sqrt(dim) l2``, ``l2 <= sqrt(dim) linf``, ``l1 <= dim linf`` and
    Hoelder's ``l2 <= sqrt(l1 linf)``. Unknown bounds are ``inf``. The batch axis is never counted in ``dim``.

    Raises:
        ValueError: a bound is negative or NaN, or ``dim`` is negative.
    """

    dim: int
    l1: float = math.inf
    l2: float = math.inf
    linf: float = math.inf

    def __post_init__(self) -> None:
        if self.dim < 0 or not all(v >= 0 for v in (self.l1, self.l2, self.linf)):
            raise ValueError(f"Norms: expected dim and bounds >= 0 and no NaN, got {self!r}")
        root = math.sqrt(self.dim)
        linf = min(self.linf, self.l2, self.l1)
        l1 = min(self.l1, self.dim * linf if linf < math.inf else math.inf)
        l2 = min(self.l2, l1, root * linf if self.dim else 0.0)
        if l1 < math.inf and linf < math.inf:
            l2 = min(l2, math.sqrt(l1) * math.sqrt(linf))
        l1 = min(l1, root * l2 if self.dim else 0.0)
        for name, value in (("linf", linf), ("l2", l2), ("l1", l1)):
            object.__setattr__(self, name, float(value))

    def __add__(self, other: Norms) -> Norms:
        """Triangle inequality: bounds ``u + v``."""
        self._same_dim(other, "+")
        return Norms(self.dim, self.l1 + other.l1, self.l2 + other.l2, self.linf + other.linf)

    def __mul__(self, factor: float) -> Norms:
        """Bounds ``factor * v``; an unknown bound stays unknown unless ``factor`` is zero."""
        a = abs(factor)
        return Norms(self.dim, *(_times(a, v) for v in (self.l1, self.l2, self.linf)))

    __rmul__ = __mul__

    def meet(self, other: Norms) -> Norms:
        """Both claims hold, so the smaller of each does."""
        self._same_dim(other, "meet")
        return Norms(self.dim, min(self.l1, other.l1), min(self.l2, other.l2), min(self.linf, other.linf))

    def concat(self, other: Norms) -> Norms:
        """Bounds the concatenation ``(u, v)``."""
        return Norms(
            self.dim + other.dim,
            self.l1 + other.l1,
            math.hypot(self.l2, other.l2),
            max(self.linf, other.linf),
        )

    def dot(self, other: Norms) -> float:
        """Bounds ``|<u, v>|`` by Hoelder in the best of the three pairings."""
        pairs = ((self.l1, other.linf), (self.l2, other.l2), (self.linf, other.l1))
        return min(_times(a, b) for a, b in pairs)

    def _same_dim(self, other: Norms, where: str) -> None:
        if self.dim != other.dim:
            raise ValueError(f"Norms {where}: expected equal dimensions, got {self.dim} and {other.dim}")


@dataclass(frozen=True, slots=True)
class OperatorNorms:
    """Suprema of ``||J||_{a->b}`` over all (almost everywhere) Jacobians ``J`` of one layer.

    =========== ===================== ==============================
    field       norm                  for a matrix ``J``
    =========== ===================== ==============================
    ``inf_inf`` l_inf to l_inf        largest row l_1
    ``two_inf`` l_2 to l_inf          largest row l_2
    ``two_two`` l_2 to l_2            largest singular value
    ``one_one`` l_1 to l_1            largest column l_1
    ``one_inf`` l_1 to l_inf          largest entry
    =========== ===================== ==============================

    Unknown entries are ``inf``; :meth:`closed` fills in what the known ones imply.
    """

    inf_inf: float = math.inf
    two_inf: float = math.inf
    two_two: float = math.inf
    one_one: float = math.inf
    one_inf: float = math.inf

    def __post_init__(self) -> None:
        if not all(getattr(self, f.name) >= 0 for f in fields(self)):
            raise ValueError(f"OperatorNorms: expected norms >= 0 and no NaN, got {self!r}")

    @classmethod
    def uniform(cls, value: float) -> OperatorNorms:
        """The same constant in all five norms: elementwise maps, permutations, sorting."""
        return cls(value, value, value, value, value)

    def closed(self, in_dim: int, out_dim: int) -> OperatorNorms:
        """The same claim with every norm improved by the others, for maps R^in_dim -> R^out_dim.

        Uses ``one_inf <= two_inf <= min(inf_inf, two_two)``, ``one_inf <= one_one``, Riesz-Thorin's
        ``two_two <= sqrt(inf_inf one_one)``, ``two_two <= sqrt(out_dim) two_inf`` (Frobenius) and the
        dimension factors ``inf_inf <= sqrt(in_dim) two_inf``, ``one_one <= sqrt(out_dim) two_two``,
        ``one_one <= out_dim one_inf``, ``two_inf <= sqrt(in_dim) one_inf``.
        """
        root_in, root_out = math.sqrt(in_dim), math.sqrt(out_dim)
        ii, ti, tt, oo, oi = self.inf_inf, self.two_inf, self.two_two, self.one_one, self.one_inf
        for _ in range(2):
            oi = min(oi, ti, oo, tt, ii)
            ti = min(ti, ii, tt, root_in * oi)
            tt = min(tt, root_out * ti, math.sqrt(ii) * math.sqrt(oo) if max(ii, oo) < math.inf else math.inf)
            ii = min(ii, root_in * ti)
            oo = min(oo, root_out * tt, out_dim * oi)
        return OperatorNorms(ii, ti, tt, oo, oi)

    def push(self, radius: Norms, out_dim: int) -> Norms:
        """Bounds ``||f(x) - f(c)||`` given bounds ``radius`` on ``||x - c||``."""
        return Norms(
            out_dim,
            _times(self.one_one, radius.l1),
            _times(self.two_two, radius.l2),
            min(
                _times(self.inf_inf, radius.linf),
                _times(self.two_inf, radius.l2),
                _times(self.one_inf, radius.l1),
            ),
        )

    def pull(self, cotangent: Norms, in_dim: int) -> Norms:
        """Bounds ``||J^T g||`` given bounds ``cotangent`` on ``||g||`` (the dual of :meth:`push`)."""
        return Norms(
            in_dim,
            _times(self.inf_inf, cotangent.l1),
            min(_times(self.two_two, cotangent.l2), _times(self.two_inf, cotangent.l1)),
            min(_times(self.one_one, cotangent.linf), _times(self.one_inf, cotangent.l1)),
        )


def _times(a: float, b: float) -> float:
    """``a * b`` where a zero factor wins over an unknown (infinite) one; a product that underflows rounds up."""
    return 0.0 if a == 0 or b == 0 else max(a * b, sys.float_info.min)

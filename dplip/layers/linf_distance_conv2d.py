# SPDX-License-Identifier: Apache-2.0
"""l_inf-distance neurons over the windows of an image."""

from __future__ import annotations

from dplip.layers.distance_conv2d import DistanceConv2d
from dplip.layers.linf_distance import LinfDistance

__all__ = ["LinfDistanceConv2d"]


class LinfDistanceConv2d(DistanceConv2d, LinfDistance):
    r"""``y[o, s] = d^(-1/p) ||P_s x - w_o||_p + b_o`` over windows ``P_s x`` of ``d = (C / groups) kh kw`` entries.

    Guarantee. 1-Lipschitz from l_inf to l_inf at every ``p >= 2``; one example's gradient is at most ``d^(-1/p)
    min(||g||_1, sqrt(S) ||g||_2)`` in ``weight``. Geometry, shapes, errors and proof: :class:`DistanceConv2d`; distance
    and options (``p``, ``power_mean``, ``bias``, ``init``, ``init_scale``): :class:`LinfDistance`.

    Source: Zhang, Cai, Lu, He, Wang, Towards Certifying L-infinity Robustness using Neural Networks with L-inf-dist
    Neurons, ICML 2021, section 4.
    """

# SPDX-License-Identifier: Apache-2.0
"""Lipschitz layers: each file holds one family with its formula, guarantee and source."""

from dplip.layers.average_pool import AveragePool2d
from dplip.layers.ball_clip import BallClip
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.layers.distance import DistanceLayer
from dplip.layers.elementwise import Abs, Clamp, Monotone, Scale
from dplip.layers.group_sort import GroupSort, MaxMin
from dplip.layers.linear_spline import LinearSpline
from dplip.layers.linf_distance import LinfDistance
from dplip.layers.normalized_linear import NormalizedLinear
from dplip.layers.reference_shift import ReferenceShift
from dplip.layers.sort_linear import SortLinear
from dplip.layers.structural import Flatten, Reshape, Residual, Shift

__all__ = [
    "Abs",
    "AveragePool2d",
    "BallClip",
    "Clamp",
    "DistanceLayer",
    "Flatten",
    "GroupSort",
    "LinearSpline",
    "LinfDistance",
    "LipschitzLayer",
    "MaxMin",
    "Monotone",
    "NormalizedLinear",
    "ReferenceShift",
    "Reshape",
    "Residual",
    "Scale",
    "Shapes",
    "Shift",
    "SortLinear",
]

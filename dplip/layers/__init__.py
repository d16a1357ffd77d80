# SPDX-License-Identifier: Apache-2.0
"""Lipschitz layers: each file holds one family with its formula, guarantee and source."""

from dplip.layers.affine import Affine
from dplip.layers.affine_conv2d import AffineConv2d
from dplip.layers.average_pool import AveragePool2d
from dplip.layers.ball_clip import BallClip
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.layers.clipped_relu import ClippedReLU
from dplip.layers.convex_mix import ConvexMix, Share
from dplip.layers.distance import DistanceLayer
from dplip.layers.distance_conv2d import DistanceConv2d
from dplip.layers.elementwise import Abs, Clamp, Monotone, Scale
from dplip.layers.group_sort import GroupSort, MaxMin
from dplip.layers.householder import Householder
from dplip.layers.l2_pool import L2Pool2d
from dplip.layers.linear_spline import LinearSpline
from dplip.layers.linf_distance import LinfDistance
from dplip.layers.linf_distance_conv2d import LinfDistanceConv2d
from dplip.layers.max_pool import MaxPool2d
from dplip.layers.mean_shift import MeanShift
from dplip.layers.monotone import MonotoneResidual, Ramp
from dplip.layers.normalized_conv2d import NormalizedConv2d
from dplip.layers.normalized_linear import NormalizedLinear
from dplip.layers.order_statistic_linear import OrderStatisticLinear
from dplip.layers.position_bias import PositionBias
from dplip.layers.random_features import RandomFeatures
from dplip.layers.reference_shift import ReferenceShift
from dplip.layers.sort_conv2d import SortConv2d
from dplip.layers.sort_linear import SortLinear
from dplip.layers.stochastic_sort import StochasticSortLinear, advance_masks, example_keys
from dplip.layers.structural import Flatten, Reshape, Residual, Shift
from dplip.layers.temperature import LearnedScale

__all__ = [
    "Abs",
    "Affine",
    "AffineConv2d",
    "AveragePool2d",
    "BallClip",
    "Clamp",
    "ClippedReLU",
    "ConvexMix",
    "DistanceConv2d",
    "DistanceLayer",
    "Flatten",
    "GroupSort",
    "Householder",
    "L2Pool2d",
    "LearnedScale",
    "LinearSpline",
    "LinfDistance",
    "LinfDistanceConv2d",
    "LipschitzLayer",
    "MaxMin",
    "MaxPool2d",
    "MeanShift",
    "Monotone",
    "MonotoneResidual",
    "NormalizedConv2d",
    "NormalizedLinear",
    "OrderStatisticLinear",
    "PositionBias",
    "Ramp",
    "RandomFeatures",
    "ReferenceShift",
    "Reshape",
    "Residual",
    "Scale",
    "Shapes",
    "Share",
    "Shift",
    "SortConv2d",
    "SortLinear",
    "StochasticSortLinear",
    "advance_masks",
    "example_keys",
]

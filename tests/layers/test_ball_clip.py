# SPDX-License-Identifier: Apache-2.0
"""Projection onto a ball."""

from dplip.layers import BallClip, LipschitzLayer
from dplip.testing import LayerContract


class TestBallClip(LayerContract):
    in_shape = (7,)

    def make(self) -> LipschitzLayer:
        return BallClip(1.5)


class TestImage(LayerContract):
    in_shape = (2, 2, 2)

    def make(self) -> LipschitzLayer:
        return BallClip(0.3)


class TestScalar(LayerContract):
    in_shape = (1,)

    def make(self) -> LipschitzLayer:
        return BallClip(2.0)

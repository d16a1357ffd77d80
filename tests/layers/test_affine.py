# SPDX-License-Identifier: Apache-2.0
"""Unconstrained affine maps, as :class:`torch.nn.Linear` is bounded."""

import pytest
import torch
from torch import nn

from dplip.layers.affine import Affine
from dplip.testing import LayerContract


class TestAffine(LayerContract):
    in_shape = (6,)
    tight = {"weight"}

    def make(self):
        linear = nn.Linear(6, 4)
        return Affine(linear.weight, linear.bias)


class TestAffineWithoutBias(LayerContract):
    in_shape = (3,)

    def make(self):
        return Affine(nn.Linear(3, 5, bias=False).weight, None)


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 6), (6,)])
def test_wrong_inputs(shape):
    linear = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"expected x \[B, 6\]"):
        Affine(linear.weight, linear.bias)(torch.zeros(shape))

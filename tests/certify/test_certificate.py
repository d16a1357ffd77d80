# SPDX-License-Identifier: Apache-2.0
"""A certificate cannot hold a nonsensical claim, and counts strictly."""

import dataclasses
import math

import pytest
import torch

from dplip.certify import Certificate
from dplip.errors import UnsoundCertificate


def make(predicted, radius, norm="linf", method="margin"):
    return Certificate(torch.tensor(predicted), torch.tensor(radius, dtype=torch.float64), norm, method)


def test_counts_right_and_strictly_beyond_eps():
    c = make([0, 1, 2, 0], [0.1, 0.3, 0.5, 0.0])
    labels = torch.tensor([0, 1, 0, 0])
    assert c.certified_accuracy(labels, 0.0) == 0.5  # the tie at radius 0 and the wrong one do not count
    assert c.certified_accuracy(labels, 0.1) == 0.25
    assert c.certified_accuracy(labels, 0.3) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-300])
def test_refuses_radii_that_claim_nothing_sensible(bad):
    with pytest.raises(UnsoundCertificate, match="finite radii"):
        make([0], [bad])


def test_refuses_shapes_dtypes_and_norms():
    with pytest.raises(UnsoundCertificate, match="int64"):
        Certificate(torch.tensor([0.0]), torch.zeros(1, dtype=torch.float64), "linf", "margin")
    with pytest.raises(UnsoundCertificate, match="float64"):
        Certificate(torch.tensor([0]), torch.zeros(1), "linf", "margin")
    with pytest.raises(UnsoundCertificate, match="float64"):
        Certificate(torch.tensor([0, 1]), torch.zeros(1, dtype=torch.float64), "linf", "margin")
    with pytest.raises(UnsoundCertificate, match="norm"):
        make([0], [0.1], norm="l1")


def test_best_takes_the_largest_and_refuses_to_mix():
    best = Certificate.best([make([0, 1], [0.1, 0.4]), make([0, 1], [0.2, 0.3], method="interval")])
    assert best.radius.tolist() == [0.2, 0.4] and best.method == "margin | interval"
    with pytest.raises(UnsoundCertificate, match="one norm"):
        Certificate.best([make([0], [0.1]), make([0], [0.1], norm="l2")])
    with pytest.raises(UnsoundCertificate, match="one prediction"):
        Certificate.best([make([0], [0.1]), make([1], [0.1])])
    with pytest.raises(UnsoundCertificate):
        Certificate.best([])


def test_concat_keeps_order_and_refuses_to_mix():
    both = Certificate.concat([make([0], [0.1]), make([2, 1], [0.2, 0.3])])
    assert both.predicted.tolist() == [0, 2, 1] and both.radius.tolist() == [0.1, 0.2, 0.3] and len(both) == 3
    assert both.method == "margin"
    with pytest.raises(UnsoundCertificate, match="one norm"):
        Certificate.concat([make([0], [0.1]), make([0], [0.1], norm="l2")])


def test_is_frozen_and_checks_labels():
    c = make([0, 1], [0.1, 0.2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.radius = torch.ones(2)
    with pytest.raises(ValueError, match="labels"):
        c.certified_accuracy(torch.tensor([0]), 0.1)
    with pytest.raises(ValueError, match="eps"):
        c.certified_accuracy(torch.tensor([0, 1]), math.nan)
    empty = Certificate(c.predicted[:0], c.radius[:0], "linf", "margin")
    assert math.isnan(empty.certified_accuracy(c.predicted[:0], 0.1))

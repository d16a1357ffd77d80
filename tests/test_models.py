# SPDX-License-Identifier: Apache-2.0
"""Builders: shapes, bounds that the design promises, refused options."""

import math

import pytest
import torch

from dplip.bounds import InputDomain, forward, input_like, lipschitz, sensitivities, trace
from dplip.errors import ConfigError
from dplip.models import MODELS, build
from dplip.norms import Norms

SHAPE, CLASSES, REFERENCE = (1, 4, 4), 3, 0.2
OPTIONS = {
    "sort_mlp": [{"top_k": 2, "widths": [6, 5], "pool": 2}, {"rho": 0.3}, {"top_k": [4, 2], "bias": False}],
    "linf_mlp": [{"widths": [6]}, {"p": 8.0, "widths": [6, 6]}],
    "lipschitz_mlp": [{"activation": a} for a in ("maxmin", "fullsort", "abs", "spline")]
    + [{"ball": b, "bias": True} for b in ("frobenius", "rows_l1", "columns_l1")],
    "linf_conv": [{"channels": [3], "widths": [5]}, {"channels": [2, 4], "stride": 1, "p": 8.0}, {"top_k": 3}],
    "lipschitz_conv": [{"channels": [4, 2], "pool": pool} for pool in ("l2", "max", "average")]
    + [{"channels": [4], "activation": "spline", "bias": True}, {"channels": [2], "projection": "aol"}]
    + [{"channels": [4], "ball": b} for b in ("frobenius", "rows_l1")],
}
CASES = [(kind, options) for kind, rows in OPTIONS.items() for options in rows]


def make(kind, options):
    return build(kind, options, input_shape=SHAPE, num_classes=CLASSES, reference=REFERENCE)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_built_models_are_bounded(kind, options):
    torch.manual_seed(0)
    model = make(kind, options)
    assert model(torch.rand(5, *SHAPE)).shape == (5, CLASSES)
    assert model(torch.rand(0, *SHAPE)).shape == (0, CLASSES)
    graph, domain = trace(model), InputDomain(SHAPE, 0.0, 1.0, reference=REFERENCE)
    states = forward(graph, domain, input_like(model, domain))
    bounds = sensitivities(graph, states, Norms(CLASSES, l1=2, l2=math.sqrt(2), linf=1))
    assert set(bounds) == {name for name, _ in model.named_parameters()}
    constants = lipschitz(graph, graph.evaluate(input_like(model, domain)))
    if kind not in ("lipschitz_mlp", "lipschitz_conv"):
        assert constants.linf <= 1 + 1e-6
        assert max(bounds.values()) <= 2
    elif options.get("ball", "spectral") in ("spectral", "frobenius"):
        assert constants.l2 <= 1 + 1e-5


def test_distance_networks_are_centred():
    """Behind the reference shift every activation is 0 at the reference, whatever the weights."""
    model = make("sort_mlp", {"top_k": 2, "widths": [6, 5], "pool": 2})
    with torch.no_grad():
        hidden = model[:-2](torch.full((1, *SHAPE), REFERENCE))
    assert hidden.abs().max() == 0


def test_every_builder_is_covered():
    assert set(OPTIONS) == set(MODELS)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("resnet", {}, "model.kind"),
        ("sort_mlp", {}, "top_k"),
        ("sort_mlp", {"top_k": 2, "rho": 0.3}, "top_k"),
        ("sort_mlp", {"top_k": [2, 2, 2]}, "top_k"),
        ("sort_mlp", {"top_k": 2, "pool": 3}, "pool"),
        ("sort_mlp", {"top_k": 2, "wdths": [3]}, "wdths"),
        ("linf_mlp", {"p": 1.0}, "p <= inf"),
        ("lipschitz_mlp", {"activation": "gelu"}, "activation"),
        ("lipschitz_conv", {"pool": "min"}, "pool"),
        ("lipschitz_conv", {"kernel": 2}, "odd"),
        ("lipschitz_conv", {"ball": "columns_l1"}, "ball"),
        ("linf_conv", {"top_k": 2, "p": 8.0}, "top_k"),
        ("linf_conv", {"kernel": 9, "stride": 0}, "linf_conv|stride"),
        ("lipschitz_mlp", {"ball": "cube"}, "ball"),
        ("lipschitz_mlp", {"widths": "many"}, "lipschitz_mlp"),
        ("lipschitz_mlp", {"input_radius": 0.0}, "radius"),
    ],
)
def test_bad_options(kind, options, named):
    with pytest.raises(ConfigError, match=named):
        make(kind, options)

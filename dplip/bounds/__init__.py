# SPDX-License-Identifier: Apache-2.0
"""The norm calculus on whole models: trace, propagate, bound."""

from dplip.bounds.domain import InputDomain
from dplip.bounds.graph import Graph, trace
from dplip.bounds.independence import check_independence
from dplip.bounds.lipschitz import INPUT_NORMS, Lipschitz, lipschitz, unit_radii
from dplip.bounds.propagate import State, forward, input_like, sensitivities
from dplip.bounds.rules import register_rule

__all__ = [
    "INPUT_NORMS",
    "Graph",
    "InputDomain",
    "Lipschitz",
    "State",
    "check_independence",
    "forward",
    "input_like",
    "lipschitz",
    "register_rule",
    "sensitivities",
    "trace",
    "unit_radii",
]

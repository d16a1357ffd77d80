# SPDX-License-Identifier: Apache-2.0
"""Events in, upper bounds on epsilon out. Needs no torch and nothing of dplip.

from accountants import Gaussian, PldAccountant, PoissonSampled

step = PoissonSampled(Gaussian(noise_multiplier=1.0), sampling_prob=0.01)
PldAccountant().compose(step, 1000).epsilon(delta=1e-5)
"""

from accountants.base import Accountant, Neighbors, UnsupportedEvent
from accountants.calibrate import calibrate_noise_multiplier, calibrate_steps
from accountants.events import (
    Event,
    Gaussian,
    PoissonSampled,
    Repeat,
    Sequence,
    TruncatedPoissonSampled,
    event_from_dict,
)
from accountants.pld import PldAccountant
from accountants.rdp import RdpAccountant
from accountants.registry import ACCOUNTANTS, make_accountant

__all__ = [
    "ACCOUNTANTS",
    "Accountant",
    "Event",
    "Gaussian",
    "Neighbors",
    "PldAccountant",
    "PoissonSampled",
    "RdpAccountant",
    "Repeat",
    "Sequence",
    "TruncatedPoissonSampled",
    "UnsupportedEvent",
    "calibrate_noise_multiplier",
    "calibrate_steps",
    "event_from_dict",
    "make_accountant",
]

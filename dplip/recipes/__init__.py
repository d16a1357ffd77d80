# SPDX-License-Identifier: Apache-2.0
"""Training recipes of the l_inf-distance and sort networks: schedules, decay, normalisation and interval heads."""

from dplip.recipes.eps_schedule import EpsSchedule
from dplip.recipes.interval_head import HybridNet, IntervalHead
from dplip.recipes.local_lipschitz import LocalBounds, LocalLipschitzLoss
from dplip.recipes.norm_decay import NormDecayAdam, norm_decay_
from dplip.recipes.p_schedule import GeometricDecay, PSchedule, at_p, distance_groups, scale_learning_rates, set_p
from dplip.recipes.running_means import reestimate_means

__all__ = [
    "EpsSchedule",
    "GeometricDecay",
    "HybridNet",
    "IntervalHead",
    "LocalBounds",
    "LocalLipschitzLoss",
    "NormDecayAdam",
    "PSchedule",
    "at_p",
    "distance_groups",
    "norm_decay_",
    "reestimate_means",
    "scale_learning_rates",
    "set_p",
]

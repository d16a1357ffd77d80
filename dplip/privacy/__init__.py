# SPDX-License-Identifier: Apache-2.0
"""Clip-free DP-SGD: one frozen plan drives sampling, noise and accounting."""

from dplip.privacy.accumulation import virtual_batches
from dplip.privacy.allocation import ALLOCATIONS, Tensors, allocate, noise_weights
from dplip.privacy.distributed import DistributedClipFreeEngine
from dplip.privacy.engine import ClipFreeEngine, PublicSizeWarning
from dplip.privacy.foreign import ForeignModule, clip_foreign, unclip_foreign
from dplip.privacy.monitor import GradientToNoise, TensorSignal
from dplip.privacy.noise import NoiseSource
from dplip.privacy.optimizer import ClipFreeOptimizer
from dplip.privacy.plan import PrivacyPlan
from dplip.privacy.quantile import AdaptiveLogitClip
from dplip.privacy.replacements import Change, fix
from dplip.privacy.sampling import PoissonSampler, PrivateLoader
from dplip.privacy.schedule import ExponentialNoise, StepNoise
from dplip.privacy.sensitivity import StepSensitivity
from dplip.privacy.standardize import PrivateStandardizer
from dplip.privacy.validate import Finding, validate

__all__ = [
    "ALLOCATIONS",
    "AdaptiveLogitClip",
    "Change",
    "ClipFreeEngine",
    "ClipFreeOptimizer",
    "DistributedClipFreeEngine",
    "ExponentialNoise",
    "Finding",
    "ForeignModule",
    "GradientToNoise",
    "NoiseSource",
    "PoissonSampler",
    "PrivacyPlan",
    "PrivateLoader",
    "PrivateStandardizer",
    "PublicSizeWarning",
    "StepNoise",
    "StepSensitivity",
    "TensorSignal",
    "Tensors",
    "allocate",
    "clip_foreign",
    "fix",
    "noise_weights",
    "unclip_foreign",
    "validate",
    "virtual_batches",
]

# SPDX-License-Identifier: Apache-2.0
"""Certified robustness: around which inputs, and how far, a prediction cannot change."""

from dplip.certify.certificate import Certificate
from dplip.certify.certify import METHODS, certify
from dplip.certify.local_lipschitz import local_lipschitz
from dplip.certify.monotone import MonotoneCertificate, certify_monotone

__all__ = ["METHODS", "Certificate", "MonotoneCertificate", "certify", "certify_monotone", "local_lipschitz"]

# SPDX-License-Identifier: Apache-2.0
"""Certified robustness: around which inputs, and how far, a prediction cannot change."""

from dplip.certify.certificate import Certificate
from dplip.certify.certify import METHODS, certify

__all__ = ["METHODS", "Certificate", "certify"]

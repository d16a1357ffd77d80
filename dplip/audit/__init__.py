# SPDX-License-Identifier: Apache-2.0
"""Attempts to refute what dplip claims: searches that must find no violation."""

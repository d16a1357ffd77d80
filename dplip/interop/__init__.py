# SPDX-License-Identifier: Apache-2.0
"""Bridges to other libraries: each file is the only one that imports its library."""

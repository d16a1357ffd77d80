# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file per operator under the operator's name. Imported on first use only."""

# SPDX-License-Identifier: Apache-2.0
"""Tensors in, tensors out: one file per operator, its readable torch reference first."""

# SPDX-License-Identifier: Apache-2.0
"""dplip: networks that are private and certifiably robust, with proofs of both."""

__version__ = "0.1.0"

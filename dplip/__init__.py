# SPDX-License-Identifier: Apache-2.0
"""dplip: networks that are private and certifiably robust, with proofs of both.

The names below are the ones a training script needs; each loads its module on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "BinaryCrossEntropy": "dplip.losses",
    "Certificate": "dplip.certify",
    "ClipFreeEngine": "dplip.privacy",
    "CrossEntropy": "dplip.losses",
    "DistributedClipFreeEngine": "dplip.privacy",
    "InputDomain": "dplip.bounds",
    "LipschitzLayer": "dplip.layers",
    "LogitGradientClip": "dplip.losses",
    "MulticlassMargin": "dplip.losses",
    "PrivacyPlan": "dplip.privacy",
    "register_rule": "dplip.bounds",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dplip' has no attribute {name!r}; public names: {sorted(_HOME)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])

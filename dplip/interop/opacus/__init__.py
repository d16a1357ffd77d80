# SPDX-License-Identifier: Apache-2.0
"""Both ways with Opacus: our layers and accountants in its engine, its schedulers and loaders with ours.

The only folder of dplip that imports opacus::

    model = prepare(model, optimizer)
    engine = PrivacyEngine(accountant=accountant("pld"))
    model, optimizer, loader = engine.make_private(module=model, optimizer=optimizer, ...)
"""

from dplip.interop.opacus.findings import Finding
from dplip.interop.opacus.fixes import fix
from dplip.interop.opacus.ledgers import ProvenAccountant, accountant, from_opacus, to_opacus
from dplip.interop.opacus.loops import data_loader, noise_schedule
from dplip.interop.opacus.probe import validate
from dplip.interop.opacus.samplers import prepare

__all__ = [
    "Finding",
    "ProvenAccountant",
    "accountant",
    "data_loader",
    "fix",
    "from_opacus",
    "noise_schedule",
    "prepare",
    "to_opacus",
    "validate",
]

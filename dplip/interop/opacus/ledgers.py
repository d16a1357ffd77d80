# SPDX-License-Identifier: Apache-2.0
"""Our proven epsilon inside Opacus, and the ledgers of both carried over to the other.

Opacus' history ``[(noise multiplier, sample rate, steps)]`` and our ledger state the same facts: what was released,
not how it is bounded. So either side can go on where the other stopped.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from opacus.accountants import IAccountant, create_accountant, register_accountant
from opacus.optimizers import DPOptimizer

from accountants import Accountant, Gaussian, Neighbors, PoissonSampled, make_accountant
from accountants.mechanisms import basic_mechanisms, noise_multiplier
from dplip.errors import CheckpointError, ConfigError, PlanError

__all__ = ["ProvenAccountant", "accountant", "from_opacus", "to_opacus"]

_THEIRS = ("prv", "rdp")  # gdp under-reports and is not offered


class ProvenAccountant(IAccountant):  # type: ignore[misc]  # Opacus is untyped here
    """An upper bound on epsilon behind Opacus' interface; made by :func:`accountant`.

    Guarantee. ``get_epsilon`` bounds the epsilon of the recorded steps from above, each a Gaussian mechanism on a
    Poisson sample (Opacus' flat, per-layer and adaptive clipping with ``poisson_sampling=True``), in both directions of
    ``neighbors``; see :mod:`accountants.pld`. ``make_private_with_epsilon`` therefore overshoots no target.

    ``len`` counts steps (Opacus' own accountants count entries of the history).

    Raises:
        PlanError: a step without a theorem: several Poisson batches accumulated into one (an example may then count
            twice; use ``BatchMemoryManager``, which splits one batch), or numbers out of range.
    """

    kind: ClassVar[str]
    neighbors: ClassVar[Neighbors]
    history: list[tuple[float, float, int]]

    def __init__(self) -> None:
        super().__init__()

    @classmethod
    def mechanism(cls) -> str:
        return _mechanism(cls.kind, cls.neighbors)

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        _event(noise_multiplier, sample_rate)  # refuses what has no theorem
        entry = (float(noise_multiplier), float(sample_rate))
        if self.history and tuple(self.history[-1][:2]) == entry:
            self.history[-1] = (*entry, self.history[-1][2] + 1)
        else:
            self.history.append((*entry, 1))

    def get_epsilon(self, delta: float, *args: Any, **kwargs: Any) -> float:
        """Proven epsilon at ``delta``; options of other accountants (``alphas``, ``eps_error``) do not apply.

        Raises:
            PlanError: ``delta`` or an entry of the history is out of range.
        """
        try:
            return from_opacus(self, self.kind, self.neighbors).epsilon(delta)
        except ValueError as error:
            raise PlanError(f"accountant: {error}") from error

    def __len__(self) -> int:
        return sum(steps for _, _, steps in self.history)

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[DPOptimizer], None]:
        def record(optimizer: DPOptimizer) -> None:
            if optimizer.accumulated_iterations != 1:
                raise PlanError(
                    f"accountant: expected one Poisson batch per step, got {optimizer.accumulated_iterations} "
                    "accumulated, in which an example may count more than once; use BatchMemoryManager"
                )
            self.step(noise_multiplier=optimizer.noise_multiplier, sample_rate=sample_rate)

        return record

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace the history by a saved one, of this or of any Opacus accountant: the facts are the same.

        Raises:
            ValueError: the state is empty or lacks a key, as in Opacus.
            CheckpointError: the history is damaged.
        """
        before = self.history
        own = {"mechanism": self.mechanism()} if state_dict and "mechanism" in state_dict else {}
        super().load_state_dict({**(state_dict or {}), **own})
        try:
            self.history = [(float(z), float(q), steps) for z, q, steps in self.history]
            from_opacus(self, self.kind, self.neighbors)
        except (PlanError, TypeError, ValueError) as error:
            self.history = before
            raise CheckpointError(f"accountant: expected a saved history, got a damaged one ({error})") from error


def accountant(name: str = "pld", neighbors: Neighbors | str = Neighbors.ADD_OR_REMOVE_ONE) -> str:
    """The name under which ``PrivacyEngine(accountant=...)`` finds our accountant ``name``, registered on first use.

    Args:
        name: ``"pld"`` or ``"rdp"``, see :data:`accountants.ACCOUNTANTS`.
        neighbors: neighbouring relation of the guarantee; Opacus' own accountants know add-or-remove only.

    Raises:
        ConfigError: ``name`` or ``neighbors`` is unknown.
    """
    try:
        relation = Neighbors(neighbors)
        make_accountant(name, relation)
    except ValueError as error:
        raise ConfigError(f"accountant: {error}") from error
    _register(name, relation)
    return _mechanism(name, relation)


@functools.cache
def _register(name: str, relation: Neighbors) -> None:
    bound = type(f"Proven{name.title()}Accountant", (ProvenAccountant,), {"kind": name, "neighbors": relation})
    register_accountant(_mechanism(name, relation), bound)


def _mechanism(name: str, relation: Neighbors) -> str:
    return f"dplip_{name}" + ("" if relation is Neighbors.ADD_OR_REMOVE_ONE else f"_{relation.value}")


def _event(z: Any, q: Any) -> PoissonSampled:
    if not all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in (z, q)) or not 0 < q <= 1 or not z >= 0:
        raise PlanError(
            f"accountant: expected a noise multiplier >= 0 and a sampling probability in (0, 1], got {z!r} and {q!r}; "
            "fix the configuration"
        )
    return PoissonSampled(Gaussian(float(z)), float(q))


def from_opacus(
    source: IAccountant | Iterable[tuple[float, float, int]],
    name: str = "pld",
    neighbors: Neighbors = Neighbors.ADD_OR_REMOVE_ONE,
) -> Accountant:
    """Our accountant ``name`` with the steps of an Opacus accountant or history.

    Raises:
        PlanError: an entry is out of range.
    """
    ours = make_accountant(name, neighbors)
    for z, q, steps in source.history if isinstance(source, IAccountant) else source:
        try:
            ours.compose(_event(z, q), steps)
        except ValueError as error:
            raise PlanError(f"accountant: {error}") from error
    return ours


def to_opacus(source: Accountant, mechanism: str = "prv") -> IAccountant:
    """An Opacus accountant with the steps of ours, such as ``ClipFreeEngine().accountant``.

    Its numbers are Opacus': ``"rdp"`` is an upper bound, ``"prv"`` the upper end of an estimate.

    Raises:
        PlanError: Opacus has no word for a step (truncated sampling, replace-one), or ``mechanism`` under-reports.
    """
    ours = mechanism in (_mechanism(n, source.neighbors) for n in ("pld", "rdp"))
    if mechanism not in _THEIRS and not ours:
        raise PlanError(f"to_opacus: expected one of {_THEIRS} or a registered one of ours, got {mechanism!r}")
    if source.neighbors is not Neighbors.ADD_OR_REMOVE_ONE and not ours:
        raise PlanError("to_opacus: expected add_or_remove_one, the only relation Opacus knows, got replace_one")
    theirs = create_accountant(mechanism)
    for event, count in basic_mechanisms(source.ledger).items():
        match event:
            case Gaussian():
                q = 1.0
            case PoissonSampled(sampling_prob=q):
                pass
            case _:
                raise PlanError(f"to_opacus: expected Gaussians on Poisson samples, got {event!r}; keep our accountant")
        theirs.history.append((noise_multiplier(event), q, count))
    return theirs

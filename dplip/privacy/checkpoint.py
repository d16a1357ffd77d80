# SPDX-License-Identifier: Apache-2.0
"""One file from which a private run goes on: weights, optimizer, ledger, plan, schedules, and no randomness.

What a checkpoint covers. The ledger in the file counts exactly the steps that made the weights in the file. Steps taken
after it and lost with the process were never released, provided nothing about them left the process: save first, then
show, log or copy. A resumed run takes those steps again with fresh noise on fresh Poisson draws, and the ledger again
counts exactly the steps behind the weights.

No generator state is stored. Restoring one would draw the noise of lost steps a second time, on other data: had any of
the lost steps been seen, the difference of the two would be free of noise. Every stream starts anew from the operating
system (under ``insecure_seed``, from the seed and the number of steps).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accountants import make_accountant
from dplip.errors import CheckpointError, PlanError
from dplip.privacy.optimizer import ClipFreeOptimizer

if TYPE_CHECKING:
    from dplip.privacy.engine import ClipFreeEngine

__all__ = ["capture", "restore", "restore_ledger"]

FORMAT = 1
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


def capture(engine: ClipFreeEngine, lr_schedulers: Iterable[Any], extra: Any) -> dict[str, Any]:
    """Everything that :func:`restore` needs, as tensors and plain data.

    Raises:
        PlanError: nothing was made private yet, or a draw is half accumulated.
        CheckpointError: a state holds something else than tensors and plain data.
    """
    _, optimizer, _ = engine.attached("checkpoints")
    if optimizer.guard.part.index > 0 or not optimizer.guard.part.last:
        raise PlanError(
            "save_checkpoint: expected the end of a step, got a draw that is accumulated in part; "
            "save after optimizer.step() of its last part"
        )
    state = {
        "format": FORMAT,
        "engine": engine.state_dict(),
        "module": optimizer.sensitivity.model.state_dict(),
        "loss": optimizer.sensitivity.loss.state_dict(),
        "optimizer": optimizer.state_dict(),
        "groups": _groups(optimizer),
        "trainable": sorted(optimizer.sensitivity.trainable),
        "lr_schedulers": [scheduler.state_dict() for scheduler in lr_schedulers],
        "rng": "fresh",
        "extra": extra,
    }
    plain: dict[str, Any] = _plain(state, "")
    return plain


def restore(engine: ClipFreeEngine, state: Mapping[str, Any], lr_schedulers: Iterable[Any]) -> Any:
    """Put a captured state into an engine whose ``make_private`` was called as for the saved run; returns ``extra``.

    Everything is checked before anything changes, and the ledger changes first.

    Raises:
        PlanError: nothing was made private yet.
        CheckpointError: the file is damaged, of another format, plan, model, parameter groups or schedulers, or the
            engine has taken steps that loading would forget.
    """
    _, optimizer, _ = engine.attached("checkpoints")
    schedulers = list(lr_schedulers)
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"load_checkpoint: expected a file of ClipFreeEngine.save_checkpoint, format {FORMAT}, got another; "
            "pass that file"
        )
    try:
        module, loss, inner = state["module"], state["loss"], state["optimizer"]
        groups, trainable, saved = state["groups"], state["trainable"], state["lr_schedulers"]
        ledger, extra = state["engine"], state["extra"]
    except KeyError as error:
        raise CheckpointError(f"load_checkpoint: expected the key {error}, got none; the file is damaged") from error
    _same_tensors("module", optimizer.sensitivity.model, module)
    _same_tensors("loss", optimizer.sensitivity.loss, loss)
    _same("trainable parameters", sorted(optimizer.sensitivity.trainable), trainable)
    _same("parameter groups", _groups(optimizer), groups)
    _same("number of lr schedulers", len(schedulers), len(saved))
    held = [len(g["params"]) for g in inner["param_groups"]] if isinstance(inner, Mapping) else None
    _same("sizes of the parameter groups", [len(g) for g in groups], held)
    engine.load_state_dict(ledger)
    optimizer.sensitivity.model.load_state_dict(module)
    optimizer.sensitivity.loss.load_state_dict(loss)
    optimizer.load_state_dict(inner)
    for scheduler, values in zip(schedulers, saved, strict=True):
        scheduler.load_state_dict(values)
    optimizer.refresh_bounds()
    optimizer.discard()
    return extra


def restore_ledger(engine: ClipFreeEngine, state: dict[str, Any]) -> None:
    """Put plan-checked ledger and steps into ``engine`` and start fresh streams; see its ``load_state_dict``."""
    plan, optimizer, loader = engine.attached("load_state_dict")
    try:
        saved, steps, ledger = state["plan"], state["steps_taken"], state["accountant"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"engine: expected a saved engine state, got a damaged one ({error}); restart") from error
    if not isinstance(saved, dict) or type(steps) is not int or not 0 <= steps <= plan.steps:
        raise CheckpointError(
            f"engine: expected a plan and 0 to {plan.steps} steps taken, got {steps!r}; the checkpoint is "
            "damaged, restart"
        )
    if saved != plan.to_dict():
        changed = sorted(k for k in {*saved, *plan.to_dict()} if saved.get(k) != plan.to_dict().get(k))
        raise CheckpointError(
            f"engine: expected the plan of the checkpoint, got changes in {changed}; restore them or start a new run"
        )
    fresh = make_accountant(engine.accountant.name, engine.neighbors)
    try:
        fresh.load_state_dict(ledger)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"engine: expected a saved ledger, got a damaged one ({error}); restart") from error
    if fresh.ledger != plan.ledger(steps):
        raise CheckpointError(
            f"engine: expected a ledger of {steps} steps of the plan, got {fresh.ledger}; the checkpoint is "
            "damaged, restart"
        )
    if steps < optimizer.steps_taken:
        raise CheckpointError(
            f"engine: expected a checkpoint of at least {optimizer.steps_taken} steps, got {steps}; steps "
            "taken since would be forgotten, load it into a new engine"
        )
    engine.accountant.load_state_dict(ledger)
    optimizer.continue_from(steps)
    optimizer.noise.continue_from(steps)
    loader.sampler.continue_from(steps)


def _groups(optimizer: ClipFreeOptimizer) -> list[list[str]]:
    names = {id(p): name for name, p in optimizer.sensitivity.named_parameters().items()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _same(what: str, here: Any, there: Any) -> None:
    if here != there:
        raise CheckpointError(
            f"load_checkpoint: expected the {what} of the saved run, {there}, got {here}; "
            "build model, optimizer and schedulers as they were"
        )


def _same_tensors(what: str, module: nn.Module, saved: Any) -> None:
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"load_checkpoint: expected the {what}'s tensors, got none; the file is damaged")
    here = {name: tuple(t.shape) for name, t in module.state_dict().items() if isinstance(t, Tensor)}
    there = {name: tuple(t.shape) for name, t in saved.items() if isinstance(t, Tensor)}
    changed = sorted(n for n in {*here, *there} if here.get(n) != there.get(n))
    if changed:
        raise CheckpointError(
            f"load_checkpoint: expected the saved {what}, got differences in {changed[:5]}; build it as it was"
        )


def _plain(value: Any, where: str) -> Any:
    """``value`` in types that ``torch.load(weights_only=True)`` reads, tensors without their graphs."""
    if type(value) in (Tensor, nn.Parameter):  # a sharded tensor is one rank's part, no checkpoint
        return value.detach()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        kind = OrderedDict if isinstance(value, OrderedDict) else Counter if isinstance(value, Counter) else dict
        return kind({_plain(k, where): _plain(v, f"{where}/{k}") for k, v in value.items()})
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        parts = [_plain(v, f"{where}/{i}") for i, v in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    raise CheckpointError(
        f"save_checkpoint: expected tensors and plain data, got {type(value).__name__} at '{where[1:]}'; "
        "a checkpoint must load without running code, store numbers, strings and containers"
    )

# SPDX-License-Identifier: Apache-2.0
"""Before training: what in a module stops clip-free training, by name, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from dplip.bounds import InputDomain, trace
from dplip.bounds.rounding import FLOOR
from dplip.bounds.rules import has_rule, mixes_examples, module_layer
from dplip.errors import DplipError
from dplip.layers import LipschitzLayer
from dplip.losses import BoundedLoss, CrossEntropy
from dplip.privacy.replacements import replacement
from dplip.privacy.sensitivity import StepSensitivity

__all__ = ["Finding", "validate"]


@dataclass(frozen=True)
class Finding:
    """One reason why no sensitivity can be proved.

    Attributes:
        name: where, as in ``named_modules``; empty for the module itself or its ``forward``.
        problem: what is there and why it breaks the proof.
        remedy: what to do, an imperative.
        replacement: what :func:`dplip.privacy.fix` would put there; None where it would leave it.
    """

    name: str
    problem: str
    remedy: str
    replacement: str | None = None

    def __str__(self) -> str:
        return f"{self.name or 'model'}: {self.problem}; {self.remedy}"


def validate(module: nn.Module, *, domain: InputDomain | None = None, loss: BoundedLoss | None = None) -> list[Finding]:
    """Everything found in ``module`` that :meth:`ClipFreeEngine.make_private` would refuse, all at once; [] if nothing.

    Looks at the submodules first and, where those are all known, at ``forward``: the module is traced in training mode
    and, given a ``domain``, its sensitivity is computed, so that ``[]`` then means it can be made private.

    Args:
        module: left as it is.
        domain: where inputs live; without it, bounds that need the input's norm are not looked at.
        loss: by default cross-entropy.
    """
    with _training(module):
        found = [*_submodules(module), *_tensors(module)]
        return found or _forward(module, domain, CrossEntropy() if loss is None else loss)


def _submodules(module: nn.Module) -> Iterator[Finding]:
    hidden: set[int] = set()
    for name, part in module.named_modules():
        if id(part) in hidden:
            continue
        problem = _problem(part)
        if problem is not None or has_rule(part):
            hidden |= {id(m) for m in part.modules()}  # what it is made of is its own affair
        if problem is not None:
            found = replacement(part)
            if found is None:
                yield Finding(name, *problem)
            else:
                new, why = found
                kind = type(new).__name__
                yield Finding(name, f"{type(part).__name__}: {why}", f"use {kind}, or run fix(module)", kind)


def _problem(part: nn.Module) -> tuple[str, str] | None:
    """What is wrong with one module and what to do; None where nothing is."""
    kind = type(part).__name__
    remedy = mixes_examples(part)
    if remedy is not None:
        return f"{kind} mixes the examples of a batch, so no per-example sensitivity exists", remedy
    try:
        layer = module_layer(part)
    except DplipError as error:
        return _split(error)
    if layer is not None or isinstance(part, LipschitzLayer):
        return None
    # torch.fx looks into a user's module, and at one of torch.nn as a whole
    whole = type(part).__module__.startswith("torch.nn") and next(part.children(), None) is None
    if replacement(part) is not None or (whole and type(part) is not nn.Sequential):
        return (
            f"{kind} has no rule",
            "use a layer of dplip.layers, subclass LipschitzLayer, call dplip.bounds.register_rule, or name it in "
            "foreign= to clip its gradients per example",
        )
    if any(p.requires_grad for p in part.parameters(recurse=False)):
        owned = [n for n, p in part.named_parameters(recurse=False) if p.requires_grad]
        return (
            f"{kind} trains {owned} outside a layer, so their gradients have no bound",
            "move them into a LipschitzLayer such as dplip.layers.LearnedScale or PositionBias",
        )
    return None


def _tensors(module: nn.Module) -> Iterator[Finding]:
    lazy = [n for n, p in module.named_parameters() if is_lazy(p)]
    if lazy:
        yield Finding("", f"parameters {lazy} have no shape yet", "run the module once on a public input")
        return
    kinds = {p.dtype for p in module.parameters()}
    low = kinds - set(FLOOR)
    if low:
        fixable = all(str(k) in ("torch.float16", "torch.bfloat16") for k in low)
        yield Finding(
            "",
            f"parameters are {sorted(map(str, low))}, in which bounds are not proved",
            "call module.float(), or run fix(module)",
            "torch.float32" if fixable else None,
        )
    elif len(kinds) > 1:
        yield Finding("", f"parameters are of several types {sorted(map(str, kinds))}", "make them one, .float()")
    if not any(p.requires_grad for p in module.parameters()):
        yield Finding("", "nothing can be trained", "unfreeze a parameter")


def _forward(module: nn.Module, domain: InputDomain | None, loss: BoundedLoss) -> list[Finding]:
    try:
        if domain is None:
            trace(module)
        else:
            StepSensitivity(module, domain, loss)
    except DplipError as error:
        return [Finding("", *_split(error))]
    return []


def _split(error: DplipError) -> tuple[str, str]:
    """Problem and remedy of a message in the one shape that messages take."""
    problem, _, remedy = str(error).rpartition("; ")
    return (problem, remedy) if problem else (remedy, "change the module")


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    module.train()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode

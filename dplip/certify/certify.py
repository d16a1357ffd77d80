# SPDX-License-Identifier: Apache-2.0
"""One call from a model and a batch to a certificate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dplip.bounds.lipschitz import INPUT_NORMS
from dplip.certify.certificate import Certificate
from dplip.certify.interval import IntervalCertifier
from dplip.certify.local_lipschitz import LocalCertifier
from dplip.certify.margin import MarginCertifier
from dplip.certify.subject import Subject
from dplip.errors import ConfigError, DataError, NoRuleError

__all__ = ["METHODS", "certify"]

METHODS = ("best", "margin", "interval", "local")


@torch.no_grad()
def certify(
    model: nn.Module,
    x: Tensor,
    norm: str = "linf",
    *,
    method: str = "best",
    domain: tuple[float, float] | None = None,
    batch_size: int = 256,
) -> Certificate:
    """The deployed model's class at every example, and a radius within which it provably stays the same.

    What is proved, for every input ``x'`` with ``||x' - x|| < radius``: the model with its stored weights, evaluated in
    exact arithmetic *and* as deployed in its own dtype (IEEE rounding to nearest, sums in any order; no TF32 or other
    reduced-precision products), returns the class ``predicted``. The margin left over must exceed the rounding errors
    of the deployment and of this computation, see :mod:`dplip.certify.roundoff`. An input of higher precision than the
    model is rounded to the model's dtype first. In float32 the provable rounding of wide affine layers can cost some
    percent of a small radius; deploy and certify ``model.double()`` to avoid that. No label is seen, and the model
    is left as it was.

    Args:
        model: in evaluation mode, of layers with bound rules; returns logits [B, C], C >= 2.
        x: [B, *] floating. Examples with NaN or infinite entries or logits get radius 0.
        norm: of the perturbation, ``"linf"`` or ``"l2"``.
        method: ``"margin"`` (Lipschitz constants of the norm calculus, see :mod:`dplip.certify.margin`), ``"interval"``
            (boxes, see :mod:`dplip.certify.interval`), ``"best"``: the larger of the two, or the margin alone where
            a layer has no interval rule; or ``"local"``: what ``"best"`` uses and Lipschitz constants of each ball, see
            :mod:`dplip.certify.local_lipschitz`, never below the margin's and the slowest by far.
            ``Certificate.method`` says which.
        domain: ``(lower, upper)`` of every input entry. Boxes are cut to it, which is sound only against attackers
            whose inputs stay in the domain: the certificate then covers ``x'`` in the ball *and* in the domain. None:
            all of space.
        batch_size: examples per chunk; bounds memory, changes no result beyond rounding.

    Returns:
        A :class:`Certificate` of B examples on the device of ``x``.

    Raises:
        UnsoundCertificate: training mode, a layer that is not the deployed function, or an output that is not [B, C].
        NoRuleError: a layer has no bound rule (or, with ``"interval"`` and ``"local"``, no interval rule).
        MixesExamplesError: the model's examples depend on one another.
        BoundViolation: the deployed logits differ from the float64 ones by more than rounding can explain.
        DataError: ``x`` is not floating, or outside ``domain``.
        ConfigError: an argument is unknown or out of range.
    """
    if norm not in INPUT_NORMS or method not in METHODS or batch_size < 1:
        raise ConfigError(
            f"certify: expected norm in {INPUT_NORMS}, method in {METHODS} and batch_size >= 1, "
            f"got {norm!r}, {method!r} and {batch_size}; fix them"
        )
    if not x.is_floating_point() or x.ndim < 2:
        raise DataError(f"certify: expected floating x [B, *], got {x.dtype} {tuple(x.shape)}; convert it")
    _check_domain(x, domain)
    subject = Subject(model, x.dtype)
    first = subject.at(x[:1])
    margins = MarginCertifier(subject, norm, first.values)
    boxes: IntervalCertifier | None = None
    if method != "margin":
        local = method == "local"
        boxes = LocalCertifier(margins, domain, first.values) if local else IntervalCertifier(margins, domain)
        try:
            boxes.probe(first)
        except NoRuleError:
            if method != "best":
                raise
            boxes = None
    parts = []
    for start in range(0, max(len(x), 1), batch_size):
        point = subject.at(x[start : start + batch_size])
        radius = margins.radius(point)
        if boxes is not None:
            radius = boxes.radius(point, radius, improve=method != "interval")
        radius = torch.where(point.claimable, radius, 0.0)
        name = _name(method, boxes, domain)
        parts.append(Certificate(point.predicted.to(x.device), radius.to(x.device), norm, name))
    return Certificate.concat(parts)


def _name(method: str, boxes: IntervalCertifier | None, domain: tuple[float, float] | None) -> str:
    names = {"best": "margin+interval", "interval": "interval", "local": "margin+interval+local"}
    used = "margin" if boxes is None else names[method]
    inside = "" if boxes is None or domain is None else f" in [{domain[0]:g}, {domain[1]:g}]"
    return used + inside


def _check_domain(x: Tensor, domain: tuple[float, float] | None) -> None:
    if domain is None:
        return
    lower, upper = domain
    if not lower <= upper:
        raise ConfigError(f"certify: expected a domain with lower <= upper, got {domain}; fix it")
    seen = x[torch.isfinite(x)]
    if seen.numel():
        slack = 16 * torch.finfo(x.dtype).eps * max([abs(v) for v in domain if math.isfinite(v)], default=0.0)
        low, high = float(seen.amin()), float(seen.amax())
        if low < lower - slack or high > upper + slack:
            raise DataError(
                f"certify: expected x in the domain [{lower:g}, {upper:g}], got [{low:g}, {high:g}]; "
                "rescale x or pass domain=None"
            )

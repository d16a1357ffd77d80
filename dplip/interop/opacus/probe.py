# SPDX-License-Identifier: Apache-2.0
"""What a few public examples show about training a model with Opacus."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from opacus.grad_sample.utils import prepare_module
from torch import Tensor, nn

from dplip.interop.opacus.findings import Finding, structure
from dplip.interop.opacus.samplers import prepare
from dplip.layers import LipschitzLayer

__all__ = ["validate"]

_TOLERANCE = 1e-3  # relative to the largest entry: float32 sums in another order stay far below, real errors far above

_SMALL = 1e-2  # gradients of cotangents of size 1 that are smaller than this may be cancelled ones


def validate(model: nn.Module, example: Tensor | None = None, grad_sample_mode: str = "hooks") -> list[Finding]:
    """Everything known to go wrong between ``model`` and Opacus, each with what to do about it.

    Without ``example`` only the structure is examined: batch statistics also where nothing is trained (Opacus overlooks
    these), running statistics, buffers, layers that Opacus would copy, parameters shared under ghost clipping, and
    whatever ``ModuleValidator`` knows. With it the model also runs, on a copy: state that a forward pass changes,
    outputs that depend on the other examples or on the place in the batch, and per-example gradients that differ from a
    loop over single examples are found by what they do, whatever does them. A search can refute but never prove.

    Args:
        model: as it will be given to ``PrivacyEngine``, before that.
        example: [B, *] with B >= 2, public or made up; never private data.
        grad_sample_mode: the mode that will be trained in.

    Returns:
        Findings, blocking ones first; none of them blocking means that nothing was found.

    Raises:
        ValueError: ``example`` holds fewer than two examples.
    """
    found = structure(model, grad_sample_mode)
    if example is not None:
        if example.ndim < 2 or len(example) < 2:
            raise ValueError(f"validate: expected an example [B, *] with B >= 2, got {tuple(example.shape)}; add one")
        with torch.random.fork_rng(devices=[]):
            found += _run(model, example, grad_sample_mode, {f.name for f in found if f.blocking})
    return sorted(found, key=lambda finding: not finding.blocking)


def _run(model: nn.Module, example: Tensor, mode: str, known: set[str]) -> Iterator[Finding]:
    subject = copy.deepcopy(model)
    if not subject.training:
        subject.train()
    for module in subject.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()  # its draws are independent of the other examples
    seen: set[str] = set()
    for finding in (*_changed_state(subject, example), *_coupled(subject, example)):
        if finding.name not in known | seen:
            seen.add(finding.name)
            yield finding
    if not known and not seen:
        yield from _wrong_gradients(subject, example, mode)


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and plain attributes that are tensors, numbers or generators, of this module alone."""
    tensors = {**module._parameters, **module._buffers, **vars(module)}
    state = {k: v.detach().clone() for k, v in tensors.items() if isinstance(v, Tensor)}
    numbers = {k: v for k, v in vars(module).items() if isinstance(v, int | float) and not isinstance(v, bool)}
    generators = {k: v.get_state() for k, v in vars(module).items() if isinstance(v, torch.Generator)}
    return state | {k: torch.tensor(float(v)) for k, v in numbers.items()} | generators


def _changed_state(model: nn.Module, example: Tensor) -> Iterator[Finding]:
    before = {name: _state(m) for name, m in model.named_modules()}
    model(example)
    for name, module in model.named_modules():
        after = _state(module)
        changed = [k for k, v in before[name].items() if k not in after or not _same(after[k], v)]
        if changed:
            yield Finding(
                name,
                "state",
                f"{type(module).__name__} changes {sorted(changed)} in forward, so private data or the number of "
                "passes reaches the model without noise",
                "compute such state from public data, or change it outside forward",
            )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def _coupled(model: nn.Module, example: Tensor) -> Iterator[Finding]:
    """Leaves, then the model, whose output for an example changes with its company or its place."""
    inputs: dict[str, Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        for name, m in model.named_modules()
        if isinstance(m, LipschitzLayer) or not any(True for _ in m.children())
    ]
    model(example)
    for handle in handles:
        handle.remove()
    leaves = [(name, model.get_submodule(name), x) for name, x in inputs.items() if isinstance(x, Tensor)]
    blamed = False
    for name, module, x in (*leaves, ("", model, example)):
        reason = None if (name == "" and blamed) else _coupling(module, x.detach())
        if reason is None:
            continue
        blamed = True
        random = reason == "draws at random"
        yield Finding(
            name,
            "random" if random else "coupling",
            f"{type(module).__name__} {reason}"
            + (", so it could not be compared" if random else ", so no example has a gradient of its own"),
            "make sure that its draws for one example do not depend on the others"
            if random
            else "key masks by the example itself, never by its place, and replace batch statistics",
            blocking=not random,
        )


@torch.no_grad()
def _coupling(module: nn.Module, x: Tensor) -> str | None:
    """How ``module`` breaks the independence of examples on ``x``, or None."""
    before = torch.get_rng_state()
    y = module(x)
    if not torch.equal(before, torch.get_rng_state()):
        return "draws at random"
    if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(x):
        return "returns something else than one row per example"
    if not _close(module(x), y):
        return "answers the same batch differently the second time"
    if not _close(module(x.flip(0)).flip(0), y):
        return "treats an example by its place in the batch"
    if not _close(module(torch.cat([x, 3 * x + 1 if x.is_floating_point() else x]))[: len(x)], y):
        return "treats an example by its company in the batch"
    return None


def _close(a: Tensor, b: Tensor, least: float = 1e-12) -> bool:
    """Whether two tensors agree, as measured by the largest entry or by ``least``."""
    if a.shape != b.shape:
        return False
    size = float(b.abs().max()) if b.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0, atol=_TOLERANCE * max(size, least), equal_nan=True))


def _wrong_gradients(model: nn.Module, example: Tensor, mode: str) -> Iterator[Finding]:
    """Opacus' per-example gradients (norms in ghost mode) against a loop over single examples."""
    loop, subject = copy.deepcopy(model), prepare(copy.deepcopy(model))
    with torch.no_grad():
        g = torch.randn_like(loop(example))
    expected = _micro_batches(loop, example, g)
    try:
        host = prepare_module(subject, mode, loss_reduction="sum")
        (host(example) * g).sum().backward()
        got: dict[str, Any] = {
            n: getattr(p, "grad_sample", None) for n, p in subject.named_parameters() if p.requires_grad
        }
        norms = host.get_norm_sample() if mode == "ghost" else None
    except Exception as error:  # whatever Opacus or a layer answers, it is the answer to this question
        reason = " ".join(str(error).split())[:300]
        yield Finding(
            "", "refused", f"Opacus in mode {mode!r} stops with {type(error).__name__}: {reason}", "change the mode or "
            "what it names", opacus_sees_it=True,
        )  # fmt: skip
        return
    if norms is not None:
        total = torch.stack([v.flatten(1).square().sum(1) for v in expected.values()]).sum(0).sqrt()
        wrong = [] if _close(norms, total, _SMALL) else ["the norm"]
    else:
        wrong = [n for n, v in expected.items() if not isinstance(got[n], Tensor) or not _close(got[n], v, _SMALL)]
    if wrong:
        yield Finding(
            "",
            "gradients",
            f"Opacus in mode {mode!r} and a loop over single examples disagree on {wrong}",
            "check per_sample_grad of the layers that own them, arguments by keyword and attributes that change",
        )


def _micro_batches(model: nn.Module, example: Tensor, g: Tensor) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {n: [] for n, p in model.named_parameters() if p.requires_grad}
    for i in range(len(example)):
        model.zero_grad(set_to_none=True)
        (model(example[i : i + 1]) * g[i : i + 1]).sum().backward()
        for name, rows in found.items():
            p = model.get_parameter(name)
            rows.append(torch.zeros_like(p) if p.grad is None else p.grad.detach().clone())
    return {name: torch.stack(rows) for name, rows in found.items()}

# SPDX-License-Identifier: Apache-2.0
"""The ways to take one training step that :mod:`step` compares."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from dplip import ClipFreeEngine, InputDomain
from dplip.layers import LipschitzLayer
from dplip.losses import CrossEntropy
from dplip.models import linf_mlp, lipschitz_conv, lipschitz_mlp

SHAPE, CLASSES = (1, 28, 28), 10
LEARNING_RATE, NOISE, CLIP = 0.01, 1.0, 1.0
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: lipschitz_mlp(SHAPE, CLASSES, 0.0, widths=[1024, 1024]),
    "conv": lambda: lipschitz_conv(SHAPE, CLASSES, 0.0, channels=(16, 32), widths=(64,)),
    "dist": lambda: linf_mlp(SHAPE, CLASSES, 0.0, widths=[128, 128]),
}
"""784-1024-1024-10 spectral with MaxMin; 16 and 32 3x3 filters, MaxMin, l_2 pools, 64 neurons; 784-128-128-10."""

Step = Callable[[], None]


class Skipped(Exception):
    """Why a mode was not run."""


def build(model: str, batch: int, mode: str, device: str, memory: float) -> Step:
    """A function that takes one step; the same weights and data whatever the mode.

    Raises:
        Skipped: per-example gradients would take more than ``memory`` GiB, or the mode refuses the model.
    """
    torch.manual_seed(0)
    net = MODELS[model]().to(device)
    x, y = torch.rand(batch, *SHAPE, device=device), torch.randint(CLASSES, (batch,), device=device)
    if mode in ("opacus_hooks", "vmap"):
        need = batch * sum(p.numel() * p.element_size() for p in net.parameters()) / 2**30
        if need > memory:
            raise Skipped(f"per-example gradients need {need:.1f} GiB, {memory:g} allowed")
    return MODES[mode](net, x, y)


def _sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)


def _plain(net: nn.Module, x: Tensor, y: Tensor, project: bool = False) -> Step:
    optimizer = _sgd(net)
    layers = [m for m in net.modules() if isinstance(m, LipschitzLayer)] if project else []

    def step() -> None:
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        for layer in layers:
            layer.project_()
        optimizer.zero_grad()

    return step


def _clip_free(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    loss = CrossEntropy()
    net, optimizer, _ = ClipFreeEngine().make_private(
        module=net,
        optimizer=_sgd(net),
        data_loader=_loader(x, y),
        loss=loss,
        noise_multiplier=NOISE,
        steps=10**6,
        population=10 * len(x),
        domain=InputDomain(SHAPE, 0.0, 1.0),
    )

    def step() -> None:
        loss(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _opacus(net: nn.Module, x: Tensor, y: Tensor, mode: str) -> Step:
    from opacus import PrivacyEngine

    from dplip.errors import DplipError
    from dplip.interop.opacus import prepare

    criterion = nn.CrossEntropyLoss()
    try:
        prepared = prepare(net)
    except DplipError as reason:
        raise Skipped(str(reason)) from reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on its generator, and on hooks where the input needs no gradient
        private = PrivacyEngine().make_private(
            module=prepared,
            optimizer=_sgd(prepared),
            data_loader=_loader(x, y),
            criterion=criterion,
            noise_multiplier=NOISE,
            max_grad_norm=CLIP,
            grad_sample_mode=mode,
            poisson_sampling=False,
        )
    if mode == "ghost":
        module, optimizer, criterion, _ = private
    else:
        module, optimizer, _ = private

    def step() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            criterion(module(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _vmap(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    optimizer = _sgd(net)
    parameters = dict(net.named_parameters())
    buffers = dict(net.named_buffers())

    def one(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(net, (weights, buffers), (image[None],))
        return nn.functional.cross_entropy(logits, label[None])

    per_example = vmap(grad(one), in_dims=(None, 0, 0))

    def step() -> None:
        grads = per_example({k: p.detach() for k, p in parameters.items()}, x, y)
        squares = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0)
        factor = (CLIP / squares.sqrt().clamp_min(1e-6)).clamp_max(1.0)
        for name, p in parameters.items():
            total = torch.einsum("b,b...->...", factor, grads[name])
            p.grad = (total + NOISE * CLIP * torch.randn_like(total)) / len(x)
        optimizer.step()
        optimizer.zero_grad()

    try:
        step()
    except RuntimeError as reason:
        raise Skipped(f"vmap: {str(reason).splitlines()[0]}") from reason
    return step


def _loader(x: Tensor, y: Tensor) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(x, y), batch_size=len(x))


MODES: dict[str, Callable[[nn.Module, Tensor, Tensor], Step]] = {
    "plain": _plain,
    "projected": lambda net, x, y: _plain(net, x, y, project=True),
    "clip_free": _clip_free,
    "opacus_hooks": lambda net, x, y: _opacus(net, x, y, "hooks"),
    "opacus_ghost": lambda net, x, y: _opacus(net, x, y, "ghost"),
    "vmap": _vmap,
}

# SPDX-License-Identifier: Apache-2.0
"""Every layer under Opacus: per-example gradients and norms equal those of a loop over single examples."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from opacus import PrivacyEngine
from opacus.grad_sample.utils import prepare_module
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dplip import layers
from dplip.errors import IncompatibleModelError
from dplip.interop.opacus import accountant, prepare
from tests.interop.opacus_zoo import ABSTRACT, CASES, REFUSED, mixed, trains

pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Full backward hook is firing")

LAYERS = {
    n for n in layers.__all__ if isinstance(getattr(layers, n), type) and issubclass(getattr(layers, n), nn.Module)
}


TRAINED = [name for name in CASES if trains(name)]


def loop(model: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Per-example gradients of ``sum(model(x) * g)``, one example at a time, without Opacus."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for i in range(len(x)):
        model.zero_grad(set_to_none=True)
        (model(x[i : i + 1]) * g[i : i + 1]).sum().backward()
        for name, p in model.named_parameters():
            found[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    return {name: torch.stack(rows) for name, rows in found.items()}


def norms(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack([v.flatten(1).square().sum(1) for v in gradients.values()]).sum(0).sqrt()


def compare(model: nn.Module, x: Tensor, mode: str) -> None:
    """Opacus in ``mode`` against the loop."""
    with torch.no_grad():
        g = torch.randn_like(model(x))
    expected = loop(copy.deepcopy(model), x, g)
    host = prepare_module(prepare(model), mode, loss_reduction="sum")
    (host(x) * g).sum().backward()
    if mode == "ghost":
        torch.testing.assert_close(host.get_norm_sample(), norms(expected), rtol=1e-9, atol=1e-12)
        return
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad_sample, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_zoo_holds_every_layer():
    assert {name.split("-")[0] for name in CASES} == LAYERS - ABSTRACT - REFUSED


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_a_loop(name, mode):
    model = mixed(name).double()
    compare(model, torch.randn(5, *CASES[name][1], dtype=torch.float64), mode)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_layer_alone_on_hard_inputs(name, mode):
    """The layer as the whole model, on zeros, ties and copies of weights, where signs and maxima degenerate."""
    make, shape = CASES[name]
    model = nn.Sequential(make()).double()
    hard = [torch.zeros(shape), torch.ones(shape), torch.full(shape, -0.5), torch.randn(shape).round()]
    hard += [
        p.detach().flatten()[: math.prod(shape)].view(shape)
        for p in model.parameters()
        if p.numel() >= math.prod(shape)
    ]
    compare(model, torch.stack([h.double() for h in hard]), mode)


@pytest.mark.parametrize("name", CASES)
def test_expanded_weights_are_exact_or_refused(name):
    make, shape = CASES[name]
    model = nn.Sequential(nn.Linear(6, 6) if len(shape) == 1 else nn.Conv2d(4, 4, 1), make()).double()
    own = [m for m in model[1].modules() if next(m.parameters(recurse=False), None) is not None]
    x = torch.randn(3, *shape, dtype=torch.float64)
    if all(isinstance(m, layers.Affine | layers.AffineConv2d) for m in own):
        compare(model, x, "ew")
    else:
        with pytest.raises(IncompatibleModelError, match=r"'ew'.*use 'hooks' or 'ghost'"):
            compare(model, x, "ew")


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("name", TRAINED)
def test_empty_batches(name, mode):
    make, shape = CASES[name]
    model = nn.Sequential(make())
    host = prepare_module(prepare(model), mode)
    host(torch.zeros(0, *shape)).sum().backward()
    if mode == "ghost":
        assert host.get_norm_sample().shape == (0,)
    else:
        assert all(p.grad_sample.shape == (0, *p.shape) for p in model.parameters())


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("name", CASES)
def test_make_private_trains(name, mode):
    """Two steps in the whole pipeline: the released sum is that of the clipped per-example gradients of a loop."""
    clip, shape = 0.7, CASES[name][1]
    model = mixed(name)
    data = TensorDataset(torch.randn(40, *shape), torch.randint(2, (40,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss(reduction="sum")
    private, optimizer, *middle, loader = PrivacyEngine(accountant="rdp").make_private(
        module=prepare(model, optimizer),
        optimizer=optimizer,
        criterion=criterion,
        data_loader=DataLoader(data, batch_size=10),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        loss_reduction="sum",
        grad_sample_mode=mode,
    )
    criterion = middle[0] if middle else criterion
    for (x, y), _ in zip(loader, range(2), strict=False):
        twin = mixed(name)
        twin.load_state_dict(model.state_dict())
        g = torch.autograd.grad(nn.CrossEntropyLoss(reduction="sum")(z := twin(x), y), z)[0].detach()
        single = loop(twin, x, g)
        factor = (clip / (norms(single) + 1e-6)).clamp(max=1)
        optimizer.zero_grad()
        criterion(private(x), y).backward()
        optimizer.step()
        for param, (n, rows) in zip(model.parameters(), single.items(), strict=True):
            expected = (factor.view(-1, *[1] * (rows.ndim - 1)) * rows).sum(0)
            torch.testing.assert_close(param.grad, expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


def test_make_private_with_epsilon_meets_its_target():
    model = mixed("LinfDistance")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(accountant=accountant("pld"))
    private, optimizer, loader = engine.make_private_with_epsilon(
        module=prepare(model, optimizer),
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(torch.randn(40, 6), torch.randint(2, (40,))), batch_size=10),
        target_epsilon=5.0,
        target_delta=1e-3,
        epochs=2,
        max_grad_norm=1.0,
    )
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(x), y).backward() if len(x) else private(x).sum().backward()
            optimizer.step()
    assert 4.5 < engine.get_epsilon(1e-3) <= 5.0


def test_layers_are_projected_after_each_step_and_only_then():
    layer = layers.NormalizedLinear(4, 4, ball="rows_l1")
    optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
    model = prepare(nn.Sequential(layer), optimizer)
    private, optimizer, _ = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for skip in (True, False):
        before = layer.weight.detach().clone()
        optimizer.signal_skip_step(do_skip=skip)
        private(torch.ones(4, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(layer.weight, before) == skip
        assert float(layer.weight.detach().abs().sum(1).max()) <= 1 + 1e-6


@pytest.mark.parametrize("name", ["NormalizedConv2d", "LinfDistanceConv2d", "LinfDistance-p8"])
def test_chunked_norms_do_not_depend_on_the_chunk(name, monkeypatch):
    monkeypatch.setattr("dplip.interop.opacus.norms._ELEMENTS", 100)
    make, shape = CASES[name]
    compare(nn.Sequential(make()).double(), torch.randn(7, *shape, dtype=torch.float64), "ghost")


def test_ghost_forms_no_per_example_gradient(monkeypatch):
    """The analytic rules answer without per_sample_grad; where an input meets its weight they may not."""
    model = nn.Sequential(
        layers.NormalizedLinear(6, 6), layers.LinfDistance(6, 6), layers.SortLinear.geometric(6, 4, 0.5)
    )
    asked: list[str] = []
    for layer in model:
        inner = type(layer).per_sample_grad
        monkeypatch.setattr(
            layer, "per_sample_grad", lambda x, g, f=inner, m=layer: asked.append(type(m).__name__) or f(m, x, g)
        )
    host = prepare_module(prepare(model), "ghost")
    host(torch.randn(5, 6)).sum().backward()
    assert asked == []
    with torch.no_grad():
        model[2].weight[0, 0] = model[1](model[0](torch.ones(1, 6)))[0, 0]
    host(torch.ones(1, 6)).sum().backward()
    assert asked == ["SortLinear"]


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_hooks_without_a_wrapper(mode):
    """``wrap_model=False``: the model stays itself, only hooks are attached."""
    model = mixed("LinfDistance-p8").double()
    x = torch.randn(5, 6, dtype=torch.float64)
    g = torch.randn_like(model(x))
    expected = loop(copy.deepcopy(model), x, g)
    host = prepare_module(prepare(model), mode, wrap_model=False, loss_reduction="sum")
    (model(x) * g).sum().backward()
    if mode == "ghost":
        torch.testing.assert_close(host.get_norm_sample(), norms(expected), rtol=1e-9, atol=1e-12)
    else:
        assert all(torch.allclose(p.grad_sample, expected[name]) for name, p in model.named_parameters())
    host.cleanup()
    model(x).sum().backward()  # nobody asks any more
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


@pytest.mark.parametrize("clipping", ["per_layer", "adaptive"])
def test_other_clippings_train(clipping):
    model = mixed("SortLinear")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {
        "per_layer": {"max_grad_norm": [1.0] * len(list(model.parameters()))},
        "adaptive": {
            "max_grad_norm": 1.0,
            "target_unclipped_quantile": 0.5,
            "clipbound_learning_rate": 0.2,
            "max_clipbound": 10.0,
            "min_clipbound": 0.1,
            "unclipped_num_std": 5.0,
        },
    }[clipping]
    engine = PrivacyEngine(accountant=accountant("pld"))
    private, optimizer, loader = engine.make_private(
        module=prepare(model, optimizer),
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(torch.randn(40, 6), torch.randint(2, (40,))), batch_size=10),
        noise_multiplier=1.0,
        clipping=clipping,
        loss_reduction="sum",
        **options,
    )
    before = [p.detach().clone() for p in model.parameters()]
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(private(x), y, reduction="sum").backward()
        optimizer.step()
    assert engine.accountant.history == [(1.0, 0.25, 4)]
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

# SPDX-License-Identifier: Apache-2.0
"""FSDP2: bounds and projections are those of the whole weights, and what cannot be made exact is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from dplip.errors import PlanError
from dplip.layers import LinfDistance, NormalizedLinear
from dplip.losses import CrossEntropy
from dplip.privacy import DistributedClipFreeEngine, GradientToNoise, StepSensitivity
from tests.privacy.ranks import values
from tests.privacy.test_distributed import dataset, laid_out, mixed_net, whole_weights
from tests.privacy.toy import DIM, DOMAIN, plan

LOSS = CrossEntropy(4.0)


def attached(module: nn.Module, optimizer: SGD | None = None) -> Any:
    optimizer = optimizer or SGD(module.parameters(), 0.3)
    _, private, loader = DistributedClipFreeEngine(insecure_seed=2).attach(
        module, optimizer, dataset(), LOSS, plan(sampling_prob=0.4, population=41), DOMAIN
    )
    return private, loader


def step(module: nn.Module, private: Any, loader: Any) -> None:
    x, y = loader.batch(loader.sampler.draw())
    private.zero_grad()
    LOSS(module(x), y).backward()
    private.step()


def bounds_over_steps(rank: int) -> list[tuple[dict[str, Any], dict[str, torch.Tensor], float]]:
    """Bounds the optimizer uses, whole weights, and the exponent, while weights and exponent move."""
    module = laid_out(mixed_net(), "fsdp2")
    private, loader = attached(module)
    found = []
    for p in (8.0, 30.0, float("inf")):
        module[2][1].p = p  # a recipe anneals it on the module that trains
        found.append((private.tensors(), whole_weights(module), p))
        step(module, private, loader)
    return found


def test_bounds_are_those_of_the_whole_model_as_it_stands() -> None:
    first, second = values(bounds_over_steps)
    plain = mixed_net()
    seen = []
    for (tensors, weights, p), (others, _, _) in zip(first, second, strict=True):
        plain.load_state_dict(weights)
        plain[2][1].p = p
        expected = StepSensitivity(plain, DOMAIN, LOSS).tensors()
        assert {n: t.bound for n, (t, _) in tensors.items()} == {n: t.bound for n, t in expected.items()}
        assert {n: t.dim for n, (t, _) in tensors.items()} == {n: t.dim for n, t in expected.items()}
        assert tensors == others
        seen.append([t.bound for t, _ in tensors.values()])
    assert seen[0] != seen[1]


def used_before(rank: int) -> bool:
    """A forward pass leaves the root gathered; attaching must see the shards all the same."""
    module = laid_out(mixed_net(), "fsdp2")
    optimizer = SGD(module.parameters(), 0.3)
    with torch.no_grad():
        module(dataset().tensors[0])
    private, loader = attached(module, optimizer)
    before = whole_weights(module)
    step(module, private, loader)
    step(module, private, loader)
    return any(not torch.equal(before[n], w) for n, w in whole_weights(module).items())


def test_a_module_that_ran_before_can_be_attached() -> None:
    assert values(used_before) == [True, True]


def refused(rank: int) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    one, two = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
    hooked, patched, partly = mixed_net(), mixed_net(), mixed_net()
    hooked[0].register_forward_hook(lambda module, args, output: 2 * output)
    patched[0].forward = lambda x: 2 * x[:, :7]  # type: ignore[method-assign]
    fully_shard(partly, mesh=one, ignored_params={partly[0].weight})
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    modules = {
        "replicated": fully_shard(mixed_net(), mesh=two),
        "mixed precision": fully_shard(mixed_net(), mesh=one, mp_policy=low),
        "hook": fully_shard(hooked, mesh=one),
        "patched": fully_shard(patched, mesh=one),
        "ignored": partly,
    }
    said = {}
    for name, module in modules.items():
        try:
            attached(module)
        except PlanError as error:
            said[name] = str(error)
    return said


def test_layouts_and_code_outside_the_proof_are_refused() -> None:
    expected = {
        "replicated": "in one shard per rank",
        "mixed precision": "expected full precision",
        "hook": "without forward hooks",
        "patched": "without forward hooks or a replaced forward",
        "ignored": "'0.weight' whole",
    }
    for said in values(refused):
        assert said.keys() == expected.keys()
        assert all(text in said[name] for name, text in expected.items()), said


def shared_weight(rank: int) -> list[str]:
    """One layer used twice is one layer in the twin: its bound is the sum over both uses."""
    from torch.distributed.fsdp import fully_shard

    def twice() -> nn.Sequential:
        torch.manual_seed(0)
        layer = NormalizedLinear(DIM, DIM)
        return nn.Sequential(layer, nn.Sequential(layer, LinfDistance(DIM, 3))).double()

    module, plain = fully_shard(twice()), twice()
    private, loader = attached(module)
    step(module, private, loader)
    plain.load_state_dict(whole_weights(module), strict=False)
    expected = StepSensitivity(plain, DOMAIN, LOSS).tensors()
    return [n for n, (t, _) in private.tensors().items() if t.bound != expected[n].bound]


def test_a_layer_used_twice_has_both_bounds() -> None:
    assert values(shared_weight) == [[], []]


def watched(rank: int) -> tuple[dict[str, float], dict[str, float]]:
    module = laid_out(mixed_net(), "fsdp2")
    private, loader = attached(module)
    monitor = GradientToNoise(private)
    step(module, private, loader)
    whole = {n: float(p.grad.full_tensor().norm()) for n, p in private.sensitivity.trainable.items()}
    return {n: t.released for n, t in monitor.tensors().items()}, whole


def test_the_monitor_reads_whole_gradients() -> None:
    (first, whole), (second, _) = values(watched)
    assert first == second == pytest.approx(whole, rel=1e-12)

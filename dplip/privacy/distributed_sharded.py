# SPDX-License-Identifier: Apache-2.0
"""Private steps of a model whose parameters are sharded by FSDP2 (``torch.distributed.fsdp.fully_shard``).

Operator norms and projections are functions of a whole weight, so no shard can compute them. A :class:`Twin` holds the
whole weights in modules of the same classes and state; bounds are proved and projections taken there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dplip.bounds import InputDomain
from dplip.errors import PlanError
from dplip.losses import BoundedLoss
from dplip.privacy.allocation import Tensors
from dplip.privacy.distributed_optimizer import DistributedOptimizer
from dplip.privacy.distributed_ranks import Ranks
from dplip.privacy.sensitivity import StepSensitivity

__all__ = ["ShardedOptimizer", "ShardedSensitivity", "Twin", "is_sharded", "reshard", "sum_gradients"]

_STRUCTURE = {"_parameters", "_modules", "_buffers", "_compiled_call_impl"}


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter is a DTensor; does not import DTensor, which takes seconds."""
    return any(_is_dtensor(p) for p in module.parameters())


def _is_dtensor(p: Tensor) -> bool:
    return hasattr(p, "placements") and hasattr(p, "full_tensor")


def reshard(module: nn.Module) -> None:
    """Put the shards back in place; a forward pass may have left whole weights there."""
    for part in module.modules():
        if callable(back := getattr(part, "reshard", None)):
            back()


def sum_gradients(module: nn.Module, ranks: Ranks) -> None:
    """Make FSDP2 sum gradients over ranks instead of averaging, and check that every entry has one owner.

    Raises:
        PlanError: a trainable parameter is not sharded once over exactly these ranks (HSDP, tensor parallelism,
            ignored parameters), or a mixed-precision policy would lower the precision that bounds are proved in.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Shard

    for name, p in module.named_parameters():
        if not _is_dtensor(p):
            if p.requires_grad:
                raise PlanError(f"engine: expected every trainable parameter sharded, got '{name}' whole; shard it too")
            continue
        mesh, placements = cast(Any, p).device_mesh, cast(Any, p).placements
        if mesh.mesh.flatten().tolist() != ranks.members() or [type(s) for s in placements] != [Shard]:
            raise PlanError(
                f"engine: expected '{name}' in one shard per rank over all {ranks.size} ranks, got {placements} over "
                f"{mesh.mesh.tolist()}; use fully_shard on a one-dimensional mesh, without replication or tensor "
                "parallelism"
            )
    for part in module.modules():
        if not isinstance(part, FSDPModule):
            continue
        policy = part._get_fsdp_state()._mp_policy
        lowered = [d for d in (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) if d is not None]
        if any(d != p.dtype for d in lowered for p in part.parameters()):
            raise PlanError(
                f"engine: expected full precision, got FSDP's {policy}; bounds are not proved in lower precision"
            )
        if not hasattr(part, "set_force_sum_reduction_for_comms"):
            raise PlanError("engine: expected an FSDP2 that can sum gradients, got an older one; use torch >= 2.8")
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        part.set_requires_gradient_sync(True)


class Twin:
    """The same modules without sharding: whole weights, shared buffers, mirrored attributes, no hooks.

    Args:
        module: a module sharded by FSDP2.

    Raises:
        PlanError: a module has hooks or a ``forward`` of its own, which the twin would not show to the bounds.
    """

    def __init__(self, module: nn.Module) -> None:
        self._whole: dict[int, nn.Parameter] = {}
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        self._shards: list[tuple[Tensor, nn.Parameter]] = []
        self.parameters = dict(module.named_parameters())
        self.module = self._twin(module, {})

    def _twin(self, module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
        if id(module) in seen:
            return seen[id(module)]
        _refuse_foreign_code(module)
        kind = type(module)
        if kind.__name__.startswith("FSDP") and len(kind.__mro__) > 2 and kind.__mro__[1].__name__ == "FSDPModule":
            kind = kind.__mro__[2]  # fully_shard derives a class from FSDPModule and the module's own
        twin: nn.Module = object.__new__(kind)
        seen[id(module)] = twin
        nn.Module.__init__(twin)
        self._pairs.append((module, twin))
        twin._buffers = module._buffers
        twin._parameters = {n: None if p is None else self._parameter(p) for n, p in module._parameters.items()}
        twin._modules = {n: None if m is None else self._twin(m, seen) for n, m in module._modules.items()}
        _mirror(module, twin)
        return twin

    def _parameter(self, p: nn.Parameter) -> nn.Parameter:
        if not _is_dtensor(p):
            return p
        if id(p) not in self._whole:
            whole = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=p.device), requires_grad=p.requires_grad)
            self._whole[id(p)] = whole
            self._shards.append((p, whole))
        return self._whole[id(p)]

    @torch.no_grad()
    def refresh(self) -> None:
        """Gather the current weights and state; collective."""
        for p, whole in self._shards:
            whole.copy_(cast(Any, p.detach()).full_tensor())
        for module, twin in self._pairs:
            _mirror(module, twin)

    @torch.no_grad()
    def scatter_(self) -> None:
        """Write this rank's part of the twin's weights into the shards; local."""
        for p, whole in self._shards:
            _local(p).copy_(_local(_part(whole.detach(), p)))


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """``whole`` sharded as ``like`` is; local."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = cast(Any, like).device_mesh, cast(Any, like).placements
    part: Tensor = DTensor.from_local(whole, mesh, [Replicate()], run_check=False).redistribute(placements=placements)
    return part


def _mirror(module: nn.Module, twin: nn.Module) -> None:
    for key, value in vars(module).items():
        if key not in _STRUCTURE and "hooks" not in key and not key.startswith("__composable"):
            twin.__dict__[key] = value


def _refuse_foreign_code(module: nn.Module) -> None:
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    foreign = [h for h in hooks if not _home(h).startswith("torch.distributed")]
    if foreign or "forward" in vars(module):
        raise PlanError(
            f"engine: expected {type(module).__name__} without forward hooks or a replaced forward, got them on a "
            "sharded module, where bounds cannot see them; remove them"
        )


def _home(hook: Any) -> str:
    owner = getattr(hook, "__self__", hook)
    return str(getattr(owner, "__module__", type(owner).__module__))


class ShardedSensitivity(StepSensitivity):
    """:class:`StepSensitivity` of the twin; ``trainable`` are the sharded parameters. Bounds are collective."""

    def __init__(self, twin: Twin, domain: InputDomain, loss: BoundedLoss) -> None:
        self.twin, self.live = twin, False  # the first bounds are taken on what attach has gathered
        super().__init__(twin.module, domain, loss)
        self.trainable = {name: p for name, p in twin.parameters.items() if p.requires_grad}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return self.twin.parameters

    def tensors(self) -> dict[str, Tensors]:
        if self.live:
            self.twin.refresh()
        return super().tensors()


class ShardedOptimizer(DistributedOptimizer):
    """Every rank holds a shard of every parameter, of its gradient and of the optimizer's state.

    FSDP2 sums the ranks' gradients in backward (:func:`sum_gradients`); each rank then adds noise of the tensor's
    standard deviation to the entries it owns, from its own stream seeded by the operating system. Every entry has one
    owner, so noise is added once, and its joint distribution is that of one process. Bounds and projection gather
    the whole weights: one all-gather of the model per forward pass and one per step beside FSDP's own.
    """

    sensitivity: ShardedSensitivity
    _collective_backward = True
    _kept_back = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._synchronised: set[str] = set()
        for name, p in self.sensitivity.trainable.items():
            # FSDP runs these hooks when a shard's gradient has been reduced
            p.register_post_accumulate_grad_hook(lambda _, name=name: self._synchronised.add(name))

    def project_(self) -> None:
        if not self.sensitivity.live:  # inside attach, where no rank may wait for another
            return
        self.sensitivity.twin.refresh()
        super().project_()
        self.sensitivity.twin.scatter_()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._synchronised.clear()

    def _check_summed(self) -> None:
        moving = {name for name in self._released() if name in self._noted and self._noted[name].bound > 0}
        due = moving if self.guard.backward_passes else set()
        # What FSDP keeps back it would add to a later step, beyond the reach of zero_grad.
        self._kept_back |= not due <= self._synchronised
        if self._kept_back:
            raise PlanError(
                "step: expected FSDP to sum every gradient in backward, got gradients kept back; leave "
                "set_requires_gradient_sync(True) and restart from the last checkpoint"
            )

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state in whole tensors, as one process would have it; collective."""
        state = self.original_optimizer.state_dict()
        whole = {
            key: {n: v.full_tensor() if _is_dtensor(v) else v for n, v in entries.items()}
            for key, entries in state["state"].items()
        }
        return state | {"state": whole}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of whole tensors; local."""
        held = [p for group in self.param_groups for p in group["params"]]  # in the order that state dicts count them
        parts = {
            key: {n: _part(v.to(held[key].device), held[key]) if _fits(v, held[key]) else v for n, v in entries.items()}
            for key, entries in state_dict["state"].items()
        }
        self.original_optimizer.load_state_dict(state_dict | {"state": parts})

    def _gradient(self, p: Tensor) -> Tensor:
        return torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad)

    def _release(self, gradients: dict[str, Tensor], sigma: dict[str, float]) -> None:
        from torch.distributed.tensor import DTensor

        shards = [gradients[name] for name in sigma]
        self.noise.release_(shards, list(sigma.values()), self.expected_batch_size)
        for name, shard in zip(sigma, shards, strict=True):
            p = cast(Any, self.sensitivity.trainable[name])
            p.grad = DTensor.from_local(
                shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )
        self.released_sigma = sigma
        self._synchronised.clear()


def _fits(value: Any, p: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == p.shape and _is_dtensor(p) and not _is_dtensor(value)


def _local(t: Tensor) -> Tensor:
    local: Tensor = cast(Any, t.detach()).to_local()
    return local

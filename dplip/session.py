# SPDX-License-Identifier: Apache-2.0
"""What a run is made of before its first step: plan, model, loss, optimizer, schedule, checked together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

from dplip.bounds import InputDomain
from dplip.config import LossConfig, OptimizerConfig, PrivacyConfig, RunConfig
from dplip.data import Dataset, Schema
from dplip.layers import LinearSpline
from dplip.losses import BoundedLoss, CrossEntropy, LogitGradientClip, MulticlassMargin
from dplip.models import build
from dplip.privacy import (
    ClipFreeEngine,
    ClipFreeOptimizer,
    ExponentialNoise,
    PrivacyPlan,
    PrivateLoader,
    StepNoise,
)

__all__ = [
    "Session",
    "learning_rate_factor",
    "make_domain",
    "make_loss",
    "make_model",
    "make_optimizer",
    "make_plan",
    "prepare",
]


def make_plan(config: PrivacyConfig) -> PrivacyPlan:
    """The frozen plan that a ``[privacy]`` section stands for, calibrated if it names an epsilon."""
    q = config.batch_size / config.population
    steps = config.steps if config.steps is not None else (config.epochs or 0) * max(1, round(1 / q))
    settings = {
        "population": config.population,
        "sampling_prob": q,
        "steps": steps,
        "delta": config.delta,
        "neighbors": config.neighbors,
        "accountant": config.accountant,
        "allocation": config.allocation,
        "sampling": config.sampling,
        "max_batch_size": config.max_batch_size,
        "noise_schedule": _noise_schedule(config),
    }
    if config.epsilon is not None:
        return PrivacyPlan.calibrated(target_epsilon=config.epsilon, **settings)
    return PrivacyPlan(noise_multiplier=config.noise_multiplier, **settings)


def _noise_schedule(config: PrivacyConfig) -> ExponentialNoise | StepNoise | None:
    gamma, every, milestones = config.noise_gamma, config.noise_every, config.noise_milestones
    if gamma is not None and every is not None:
        return ExponentialNoise(gamma, every)
    if gamma is not None and milestones is not None:
        return StepNoise(gamma, tuple(milestones))
    return None


def make_loss(config: LossConfig) -> BoundedLoss:
    """The loss that a ``[loss]`` section stands for."""
    if config.kind == "margin":
        loss: BoundedLoss = MulticlassMargin(config.margin)
    else:
        loss = CrossEntropy(config.temperature, config.margin)
    if config.logit_clip is None:
        return loss
    return LogitGradientClip(loss, config.logit_clip, config.logit_clip_norm)


def make_model(config: RunConfig, schema: Schema) -> nn.Module:
    """The untrained model; its initial weights depend on ``config.seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build(
            config.model.kind,
            config.model.options,
            input_shape=schema.input_shape,
            num_classes=schema.num_classes,
            reference=config.data.reference,
        )


def make_domain(config: RunConfig, schema: Schema) -> InputDomain:
    """The public input domain: the data set's range around the configured reference."""
    lower, upper = schema.domain
    return InputDomain(schema.input_shape, lower, upper, reference=config.data.reference)


def make_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """The plain torch optimizer that an ``[optimizer]`` section stands for."""
    groups = _parameter_groups(config, model)
    if config.kind == "sgd":
        return SGD(groups, config.lr, config.momentum, weight_decay=config.weight_decay)
    return Adam(groups, config.lr, (config.momentum, config.beta2), weight_decay=config.weight_decay)


def _parameter_groups(config: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Splines learn ``spline_lr`` times as fast as the other parameters, and never decay: 0 is not their neutral
    value."""
    splines = [p for m in model.modules() if isinstance(m, LinearSpline) for p in m.parameters()]
    held = {id(p) for p in splines}
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in held]}]
    if splines:
        groups.append({"params": splines, "lr": config.lr * config.spline_lr, "weight_decay": 0.0})
    return groups


def learning_rate_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Factor on the learning rate at 0-based ``step``: linear rise, hold, cosine fall."""
    done = step / steps
    if done < config.warmup:
        return (step + 1) / (config.warmup * steps + 1)
    left = 1 - done
    if config.decay == 0 or left >= config.decay:
        return 1.0
    return config.final + (1 - config.final) * (1 - math.cos(math.pi * left / config.decay)) / 2


@dataclass
class Session:
    """Everything a run is made of before its first step. ``averaged`` is the average of iterates, if asked for."""

    config: RunConfig
    plan: PrivacyPlan
    engine: ClipFreeEngine
    model: nn.Module
    optimizer: ClipFreeOptimizer
    schedule: LambdaLR
    loss: BoundedLoss
    loader: PrivateLoader
    averaged: AveragedModel | None
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def released(self) -> nn.Module:
        """The model to evaluate, certify and save."""
        return self.model if self.averaged is None else self.averaged.module


def prepare(config: RunConfig, data: Dataset) -> Session:
    """Build and check everything; spends nothing.

    Raises:
        DplipError: the configuration, data, model or plan is refused.
    """
    plan = make_plan(config.privacy)
    model, loss = make_model(config, data.schema), make_loss(config.loss)
    engine = ClipFreeEngine(accountant=plan.accountant, neighbors=plan.neighbors, insecure_seed=config.insecure_seed)
    _, optimizer, loader = engine.attach(
        model,
        make_optimizer(config.optimizer, model),
        TensorDataset(*data.train),
        loss,
        plan,
        make_domain(config, data.schema),
    )
    factor = config.optimizer.average
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(factor)) if factor > 0 else None
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(config.optimizer, step, plan.steps))
    return Session(config, plan, engine, model, optimizer, schedule, loss, loader, averaged)

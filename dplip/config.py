# SPDX-License-Identifier: Apache-2.0
"""Run configurations: TOML in, checked records out. Unknown keys are errors, never ignored."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dplip.errors import ConfigError

__all__ = [
    "CertifyConfig",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrivacyConfig",
    "RunConfig",
    "load_config",
    "parse_config",
]

_METHODS = ("best", "margin", "interval", "local")  # dplip.certify.METHODS, which this module may not import


@dataclass(frozen=True)
class DataConfig:
    """``[data]``: which set, and the public reference input (every entry equal) at which models are centred."""

    name: str = "digits"
    reference: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """``[model]``: ``kind`` names a builder of :mod:`dplip.models`; all other keys are its options."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossConfig:
    """``[loss]``: ``kind`` is cross_entropy or margin. ``logit_clip`` > 0 clips logit gradients, and is reported."""

    kind: str = "cross_entropy"
    temperature: float = 1.0
    margin: float = 0.0
    logit_clip: float | None = None
    logit_clip_norm: str = "l2"


@dataclass(frozen=True)
class PrivacyConfig:
    """``[privacy]``: the public numbers of :class:`dplip.privacy.PrivacyPlan`.

    ``batch_size`` is the expected one, so ``sampling_prob = batch_size / population``. Give ``epsilon`` (noise is
    calibrated to it) or ``noise_multiplier`` (0 trains without privacy), and ``steps`` or ``epochs``. The noise is
    multiplied by ``noise_gamma`` every ``noise_every`` steps (:class:`dplip.privacy.ExponentialNoise`) or at each of
    ``noise_milestones`` (:class:`dplip.privacy.StepNoise`).
    """

    population: int
    batch_size: int
    delta: float
    steps: int | None = None
    epochs: int | None = None
    epsilon: float | None = None
    noise_multiplier: float | None = None
    neighbors: str = "add_or_remove_one"
    accountant: str = "pld"
    allocation: str = "minimum_energy"
    sampling: str = "poisson"
    max_batch_size: int | None = None
    noise_gamma: float | None = None
    noise_every: int | None = None
    noise_milestones: Sequence[int] | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """``[optimizer]``: ``kind`` is sgd or adam. The learning rate rises over the fraction ``warmup`` of the steps,
    holds, and falls to ``final`` times its value over the last fraction ``decay``, along a cosine. ``average`` in (0,
    1) averages the released iterates exponentially (post-processing). ``spline_lr`` is the factor on the learning rate
    of spline coefficients and scales: what their noise does to a slope is divided by the spacing of the knots."""

    kind: str = "adam"
    lr: float = 0.01
    momentum: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    warmup: float = 0.0
    decay: float = 0.8
    final: float = 0.0
    average: float = 0.0
    spline_lr: float = 0.001


@dataclass(frozen=True)
class CertifyConfig:
    """``[certify]``: radii reported per norm, the method, how many test examples (0: all), and the type the certified
    model computes in. Certificates count the deployment's own rounding, which in float32 takes a visible share of a
    radius."""

    linf: Sequence[float] = (0.01, 0.03, 0.1, 0.3)
    l2: Sequence[float] = (0.1, 0.25, 0.5, 1.0, 1.58)
    method: str = "best"
    examples: int = 0
    dtype: str = "float64"


@dataclass(frozen=True)
class RunConfig:
    """A whole run. ``seed`` fixes the initial weights; noise and sampling are seeded by the operating system unless
    ``insecure_seed`` is given, which the report records."""

    data: DataConfig
    model: ModelConfig
    privacy: PrivacyConfig
    name: str = "run"
    seed: int = 0
    insecure_seed: int | None = None
    threads: int = 0
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    certify: CertifyConfig = field(default_factory=CertifyConfig)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form that :func:`parse_config` accepts again."""
        values = dataclasses.asdict(self)
        values["model"] = {"kind": self.model.kind, **self.model.options}
        return {k: _without_none(v) for k, v in values.items() if v is not None}


def _without_none(value: Any) -> Any:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML (or saved JSON) file and apply ``section.key=value`` overrides (values in TOML syntax).

    Raises:
        ConfigError: the file is absent or damaged, a key is unknown, or a value has the wrong type or range.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: expected a readable configuration, got {error}; check path and syntax") from error
    for override in overrides:
        _override(values, override)
    return parse_config(values, str(path))


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set: expected section.key=value, got {override!r}; add the equals sign")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set: expected '{part}' to be a section, got a value; fix {override!r}")
    values[parts[-1]] = value


def parse_config(values: Mapping[str, Any], where: str = "config") -> RunConfig:
    """A checked :class:`RunConfig` from nested dictionaries; raises :class:`ConfigError`."""
    values = dict(values)
    model = values.get("model")
    if isinstance(model, Mapping):
        options = {k: v for k, v in model.items() if k != "kind"}
        values["model"] = {**({"kind": model["kind"]} if "kind" in model else {}), "options": options}
    config = _record(RunConfig, values, where, "")
    _check(config, where)
    return config


def _record(cls: type[Any], values: Any, where: str, section: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected [{section}] to be a section, got {values!r}; write key = value lines")
    known = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {sorted(known)}"
            raise ConfigError(f"{where}: expected known keys, got '{section + '.' if section else ''}{key}'; {hint}")
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where}: expected '{section + '.' if section else ''}{name}', got nothing; add it")
    parsed = {}
    for key, value in values.items():
        hint, label = hints[key], f"{section + '.' if section else ''}{key}"
        nested = dataclasses.is_dataclass(hint)
        parsed[key] = _record(hint, value, where, key) if nested else _typed(hint, value, where, label)
    return cls(**parsed)


def _typed(hint: Any, value: Any, where: str, label: str) -> Any:
    """``value`` as ``hint``; an integer is accepted where a float is expected, nothing else is converted."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    origin = typing.get_origin(hint)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif hint in (int, str) and isinstance(value, hint) and not isinstance(value, bool):
        return value
    elif origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return dict(value)
    elif origin is not None and isinstance(value, (list, tuple)) and not issubclass(origin, Mapping):
        return tuple(_typed(typing.get_args(hint)[0], v, where, label) for v in value)
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where}: expected {label} to be {name}, got {value!r}; fix its type")


def _check(config: RunConfig, where: str) -> None:
    """Ranges that no other constructor checks."""
    o, p, c = config.optimizer, config.privacy, config.certify
    moves = (p.noise_every, p.noise_milestones)
    rules = [
        (o.kind in ("sgd", "adam"), "optimizer.kind", "'sgd' or 'adam'", o.kind),
        (o.lr > 0, "optimizer.lr", "a number > 0", o.lr),
        (0 <= o.momentum < 1, "optimizer.momentum", "0 <= momentum < 1", o.momentum),
        (0 <= o.beta2 < 1, "optimizer.beta2", "0 <= beta2 < 1", o.beta2),
        (o.weight_decay >= 0, "optimizer.weight_decay", "a number >= 0", o.weight_decay),
        (0 <= o.warmup and 0 <= o.decay and o.warmup + o.decay <= 1, "optimizer", "warmup + decay <= 1", o),
        (o.spline_lr >= 0, "optimizer.spline_lr", "a number >= 0", o.spline_lr),
        (0 <= o.average < 1, "optimizer.average", "0 <= average < 1", o.average),
        (config.loss.kind in ("cross_entropy", "margin"), "loss.kind", "'cross_entropy' or 'margin'", config.loss.kind),
        (p.population >= 1, "privacy.population", "an integer >= 1", p.population),
        (1 <= p.batch_size <= p.population, "privacy.batch_size", "1 <= batch_size <= population", p.batch_size),
        ((p.steps is None) != (p.epochs is None), "privacy", "either steps or epochs", (p.steps, p.epochs)),
        (
            (p.epsilon is None) != (p.noise_multiplier is None),
            "privacy",
            "either epsilon or noise_multiplier",
            (p.epsilon, p.noise_multiplier),
        ),
        (
            sum(v is not None for v in moves) == (p.noise_gamma is not None),
            "privacy",
            "noise_gamma with either noise_every or noise_milestones, or none of them",
            (p.noise_gamma, *moves),
        ),
        (min([*c.linf, *c.l2], default=0) >= 0, "certify", "radii >= 0", (c.linf, c.l2)),
        (c.method in _METHODS, "certify.method", f"one of {', '.join(_METHODS)}", c.method),
        (c.dtype in ("float32", "float64"), "certify.dtype", "'float32' or 'float64'", c.dtype),
        (c.examples >= 0, "certify.examples", "an integer >= 0", c.examples),
        (config.threads >= 0, "threads", "an integer >= 0", config.threads),
    ]
    for holds, key, expected, got in rules:
        if not holds:
            raise ConfigError(f"{where}: expected {key} to be {expected}, got {got!r}; fix it")

# SPDX-License-Identifier: Apache-2.0
"""What every reproduction shares: its options, its claims, its table and its JSON file.

A claim is a name, a value that was measured, a reference to compare it with, and whether it holds, which is computed
from the two and never written down by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch

import dplip
from dplip.errors import DataError, DplipError

__all__ = ["Claim", "mean_spread", "progress", "run"]


@dataclass(frozen=True)
class Claim:
    """One line of the table; ``spread`` is the standard deviation over seeds, where there are several."""

    name: str
    value: float
    reference: float
    holds: bool
    spread: float | None = None

    @classmethod
    def at_least(cls, name: str, values: float | Sequence[float], reference: float, slack: float = 0.0) -> Claim:
        """Holds where the mean of ``values`` is at least ``reference - slack``."""
        mean, spread = mean_spread(values)
        return cls(name, mean, reference, mean >= reference - slack, spread)

    @classmethod
    def at_most(cls, name: str, values: float | Sequence[float], reference: float, slack: float = 0.0) -> Claim:
        """Holds where the mean of ``values`` is at most ``reference + slack``."""
        mean, spread = mean_spread(values)
        return cls(name, mean, reference, mean <= reference + slack, spread)

    @classmethod
    def equal(cls, name: str, values: float | Sequence[float], reference: float, slack: float = 0.0) -> Claim:
        """Holds where every value is within ``slack`` of ``reference``."""
        mean, spread = mean_spread(values)
        every = values if isinstance(values, Sequence) else [values]
        return cls(name, mean, reference, all(abs(v - reference) <= slack for v in every), spread)


def mean_spread(values: float | Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for a single number)."""
    if not isinstance(values, Sequence):
        return float(values), None
    numbers = [float(v) for v in values]
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None


def progress(*words: object) -> None:
    """One line on stderr."""
    print(*words, file=sys.stderr, flush=True)


def run(main: Callable[[argparse.Namespace], list[Claim]], description: str) -> int:
    """Parse the options, call ``main(options)``, print its claims and write them.

    The options are ``quick`` (bool), ``seeds`` (int), ``json`` (path or None) and ``data_dir`` (path or None); call
    ``options.data()`` for a folder that must be there.

    Returns:
        0, or 1 where a claim does not hold, or 2 (with one line on stderr) where dplip refuses.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="two cores, under five minutes")
    parser.add_argument("--seeds", type=int, default=3, help="number of repetitions (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the claims there")
    parser.add_argument("--data-dir", type=Path, help="folder of data sets (default: $DPLIP_DATA)")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    options.data = lambda: _data(options.data_dir)
    start = time.perf_counter()
    try:
        claims = main(options)
    except DplipError as error:
        progress(error)
        return 2
    seconds = time.perf_counter() - start
    print(_table(claims))
    if options.json is not None:
        record = {
            "claims": [{k: _json_safe(v) for k, v in asdict(c).items()} for c in claims],
            "seeds": options.seeds,
            "versions": {
                "dplip": dplip.__version__,
                "numpy": numpy.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "seconds": round(seconds, 1),
            "quick": options.quick,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if all(c.holds for c in claims) else 1


def _data(given: Path | None) -> Path:
    named = str(given) if given is not None else os.environ.get("DPLIP_DATA", "")
    if not named or not Path(named).is_dir():
        raise DataError(f"data: expected a folder of data sets, got {named!r}; pass --data-dir or set DPLIP_DATA")
    return Path(named)


def _json_safe(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(claims: Sequence[Claim]) -> str:
    rows = [("claim", "value", "reference", "holds")]
    for c in claims:
        spread = "" if c.spread is None else f" +- {c.spread:.2g}"
        rows.append((c.name, f"{c.value:.4g}{spread}", f"{c.reference:.4g}", "yes" if c.holds else "NO"))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

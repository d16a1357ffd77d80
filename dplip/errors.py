# SPDX-License-Identifier: Apache-2.0
"""The named exceptions, and the one shape their messages take.

Every message is one line: where it went wrong, what was expected, what came, what to do.
The command line prints that line on stderr and exits with code 2 for any `DplipError`.
"""


class DplipError(Exception):
    """Base of every error that dplip raises for its user to act on."""


class ConfigError(DplipError):
    """A configuration file, option or argument is unknown, missing or out of range."""


class DataError(DplipError):
    """A data set is absent, damaged, or outside its declared type, shape, range or labels."""


class PlanError(DplipError):
    """A privacy plan is invalid or is being departed from; raised before any budget is spent."""


class NoRuleError(DplipError):
    """A module or operation has no bound rule, so nothing can be proved about it."""


class MixesExamplesError(DplipError):
    """A module makes one example's output depend on other examples, so no per-example bound exists."""


class UnboundedInputError(DplipError):
    """A bound needs a finite bound on the input's norm and none was given or derivable."""


class BoundViolation(DplipError):
    """A measured quantity exceeds the bound proved for it."""


class UnsoundCertificate(DplipError):
    """A certificate was asked for where its theorem's conditions do not hold."""


class IncompatibleModelError(DplipError):
    """A model cannot be trained by the host library as it is: the result would be wrong, or no gradient exists."""


class CheckpointError(DplipError):
    """A checkpoint is damaged, incompatible, or does not belong to the run that loads it."""


class RankError(DplipError):
    """Processes that train one model together disagree, or one of them failed; raised on all that are left."""


def message(where: str, expected: str, got: str, remedy: str) -> str:
    """Returns ``"where: expected X, got Y; do Z"`` on a single line.

    Args:
        where: The place at fault: a file, an option, a node of the graph.
        expected: What would have been accepted.
        got: What came instead.
        remedy: An imperative that tells the user what to do.
    """
    return " ".join(f"{where}: expected {expected}, got {got}; {remedy}".split())

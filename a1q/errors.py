"""The errors a user can meet, each with the exit code of the command line.

| code | meaning                                                          |
|------|------------------------------------------------------------------|
| 1    | a stage failed (`StageError`)                                    |
| 2    | the recipe or the command line is wrong (`RecipeError`, `UsageError`) |
| 3    | the recipe does not fit this model, exporter or machine (`MismatchError`) |
| 4    | a quality gate failed (`GateError`)                              |
| 130, 143 | interrupted, terminated (`Interrupted`)                      |

An `A1QError` is a user's affair and is printed without a traceback; anything else is a defect of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong, at one place of a file."""

    message: str
    """What was found and what was expected."""
    file: str = ""
    line: int = 0
    """1-based; 0 where there is no line (a `--set` on the command line, say)."""
    column: int = 0
    path: str = ""
    """Dotted path inside the recipe, such as `stages.q2_train.steps`."""
    hint: str = ""
    """The remedy: the nearest valid name, the names nearby, the command to type."""

    def __str__(self) -> str:
        place = self.file
        if self.line:
            place += f":{self.line}:{self.column}"
        parts = [part for part in (place, self.path, self.message) if part]
        text = ": ".join(parts)
        return f"{text}\n    {self.hint}" if self.hint else text


class A1QError(Exception):
    """Base of everything a user can cause or must be told; printed without a traceback."""

    exit_code = 1


class StageError(A1QError):
    """A stage could not finish: the data, the disk or the numbers (a loss that is not finite) are at fault."""

    exit_code = 1


class UsageError(A1QError):
    """The command line is wrong."""

    exit_code = 2


class ProblemsError(A1QError):
    """Base of the errors that carry a list of `Problem`s."""

    def __init__(self, problems: Sequence[Problem] | str):
        if isinstance(problems, str):
            problems = [Problem(problems)]
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeError(ProblemsError):
    """The recipe is wrong by itself, whatever the model."""

    exit_code = 2


class MismatchError(ProblemsError):
    """The recipe is well-formed but does not fit this model, exporter or machine."""

    exit_code = 3


class GateError(A1QError):
    """A quality gate of an `eval` stage was not met; the measurement itself is kept."""

    exit_code = 4


class Interrupted(A1QError):
    """The run was asked to stop and did so at a place from which the same command resumes."""

    def __init__(self, signal_number: int):
        self.exit_code = 128 + signal_number
        super().__init__("interrupted; the same command resumes this run")

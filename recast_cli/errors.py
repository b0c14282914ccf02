"""Errors a user can mend. The command line prints them as `error:` / `hint:` and exits with code 2."""

from __future__ import annotations


class RecastError(Exception):
    """A mistake the user can mend.

    Args:
        message: One line: which field or file, the value found, the value needed.
        hint: One line: what to do about it.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.add_note(f"hint: {hint}")  # a traceback, all that a verl job shows, has it too

    def __reduce__(self) -> tuple[type[RecastError], tuple[str, str]]:
        return type(self), (self.message, self.hint)


class DataError(RecastError, ValueError):
    """Input data (logs, catalogues, histories) that cannot be used as it is."""


class ArtifactError(RecastError, ValueError):
    """A folder on disk that is missing, incomplete, or does not belong to its parent."""


class RecipeError(RecastError, ValueError):
    """A recipe or option with an unknown key, a wrong type or a value out of bounds."""


class EnvironmentFault(RecastError, RuntimeError):
    """The machine or installation cannot do what was asked (plugin, CPUs, disk, versions)."""

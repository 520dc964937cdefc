"""What can be wrong with a corpus: one row of it, or all of it."""

from hpc.exit import Refusal


class RowError(ValueError):
    """One row breaks a rule. `kind` is a word for programs, the text says value, rule and way out."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class CorpusError(Refusal):
    """The corpus as a whole cannot be read: a file is not there, empty, cut, or of a format that is not read."""

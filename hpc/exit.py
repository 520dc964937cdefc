"""Exit codes, and the exceptions that stand for codes 2 and 75."""

OK, FAULT, REFUSED, UNFINISHED = 0, 1, 2, 75
"""Exit codes; 75 is EX_TEMPFAIL of sysexits.h: run the same command again."""


class Refusal(Exception):
    """The user asked for what must not be done; the message says what to do instead. Exit code 2."""


class Unfinished(Exception):
    """A run was stopped before its end; everything finished is kept, and the same call goes on. Exit code 75."""

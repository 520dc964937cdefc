"""The command line: verbs, flags, exit codes. Arguments are read here alone."""

from hpc.cli.main import main

__all__ = ["main"]

"""Make the output of journals: merge rows, write them in a format, compare and verify."""

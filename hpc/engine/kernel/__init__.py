"""The CPU kernel: C++ source, its compiler, and its callers."""

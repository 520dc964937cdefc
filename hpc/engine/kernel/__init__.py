"""The CPU kernel in C++, its compiler and its callers."""

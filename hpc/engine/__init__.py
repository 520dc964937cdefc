"""One replica: tokens in, tokens out. Knows nothing of MPI, files or text."""

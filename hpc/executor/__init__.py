"""The ranks of a run: rank 0 (root) leads, and the others (workers) do what its messages say."""

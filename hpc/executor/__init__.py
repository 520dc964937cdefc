"""What the ranks of a run do: rank 0 (root) leads, the others (workers) follow."""

"""From journals to the output: merge, write, compare, verify."""

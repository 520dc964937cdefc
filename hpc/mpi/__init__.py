"""Messages between ranks, the placement of ranks on cores and GPUs, and stop signals."""

"""What replaces layers of a model: attention over the KV cache, fused layers, experts."""

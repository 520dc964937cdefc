"""The native engine: continuous batching over unmodified models of transformers."""

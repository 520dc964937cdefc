"""Batch scripts, submission and the queue. Only this package imports submitit."""

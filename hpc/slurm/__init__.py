"""Batch scripts, submission, the queue. Submitit is imported here alone."""

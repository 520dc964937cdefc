"""The Python calls, for notebooks and scripts: generate here, run a job, read a run."""

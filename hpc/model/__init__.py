"""Find, check and load the model that a job names."""

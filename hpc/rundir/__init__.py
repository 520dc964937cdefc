"""The run directory: its files, its lock, its events and its log."""

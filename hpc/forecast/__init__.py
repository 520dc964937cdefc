"""Predict how long a job takes, by simulating it with step costs measured on the device."""

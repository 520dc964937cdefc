"""Decide who generates what, and in which order. Pure: arrays in, arrays out."""

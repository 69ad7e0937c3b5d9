"""Measurements of what goes on inside training."""

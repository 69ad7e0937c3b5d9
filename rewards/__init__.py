"""Rewards: pure functions with source, formula and range, and the set that scores groups.

No module here imports torch, TRL or Ray at its top: the formulas are numpy and plain Python.
"""

"""Measuring: times of calls, limits of the machine, what it is, when a result counts."""

"""Measuring: how long calls take, what the machine could do at best, what it is, and when a result
may be believed."""

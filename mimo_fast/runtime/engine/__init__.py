"""Continuous batching: requests that share the slots of one decode state."""

"""Requests that share the slots of one state."""

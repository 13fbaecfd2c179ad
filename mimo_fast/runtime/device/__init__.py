"""Asynchronous copies from the device to the host."""

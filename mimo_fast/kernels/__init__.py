"""Ops of the model, one file each: the formula, its shapes, and an implementation in plain torch
computed in float32.

The plain-torch implementations run on every device and are the oracle that faster ones are compared
with.
"""

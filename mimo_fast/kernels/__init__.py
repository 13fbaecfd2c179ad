"""Ops of the model, one file each: formula, shapes, plain torch, Triton kernel, launcher.

The plain torch implementations run on every device; the faster ones are compared with them.
"""

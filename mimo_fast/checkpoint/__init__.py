"""Checkpoints on disk: safetensors, tensor names and shapes, random weights, the embedded pair."""

"""Checkpoints on disk: safetensors files, tensor names and shapes, random weights, the pair in the
package."""

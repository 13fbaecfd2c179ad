"""The language model: weights, state, decoding loop, CUDA graphs."""

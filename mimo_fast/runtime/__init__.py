"""The models, written in terms of ops, their state, and the decoding loop."""

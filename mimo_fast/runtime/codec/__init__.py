"""The audio codec: encoder, decoder, streaming decoder, CUDA graphs."""

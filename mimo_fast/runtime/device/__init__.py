"""What the language model and the codec ask of a device: copies to the host, captured graphs."""

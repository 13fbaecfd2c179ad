"""Products with dense and quantized weights."""

"""Speech that can be told from a person's: a watermark that is heard by a detector, and signed
provenance."""

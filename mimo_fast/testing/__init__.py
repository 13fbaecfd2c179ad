"""What tests and `verify` compare with: ground truth, oracles, synthetic models."""

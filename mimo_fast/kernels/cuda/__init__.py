"""What csrc/cuda builds."""

"""What csrc/cpu builds."""

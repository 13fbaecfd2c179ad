"""Studies of designs that the product does not use yet: each a program with a question, run on a
GPU."""

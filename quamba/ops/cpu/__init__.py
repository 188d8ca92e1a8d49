"""CPU implementations of the ops that need more than a few lines; one file per op, under the op's name."""

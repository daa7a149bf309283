"""Speculative decoding: drafters propose tokens, the target verifies them, and the output stays what it is without."""

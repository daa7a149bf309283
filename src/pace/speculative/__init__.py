"""Speculative decoding: drafters propose tokens, the target verifies them, and the output stays what it is without."""

from pace.speculative.drafter import Drafter, Proposal
from pace.speculative.loader import load

__all__ = ["Drafter", "Proposal", "load"]

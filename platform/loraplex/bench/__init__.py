"""Yardsticks that need no cluster: the engine alone, and one gateway over replayed steps."""

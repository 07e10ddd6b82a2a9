"""Yardsticks that need no cluster. Import torch, transformers, safetensors, msgspec and numpy alone."""

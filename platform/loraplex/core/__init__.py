"""Frozen data that crosses package borders. Imports nothing of ours from above."""

"""Metrics, each named once, and the set-up of logging. Knows nothing of what is measured."""

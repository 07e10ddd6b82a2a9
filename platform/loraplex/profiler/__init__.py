"""Measures an engine step by step and fits ``loraplex.cost`` to it. Called by ``loraplex profile``."""

"""Planning of an LLM fleet under real function popularity and real lengths, against the baselines.

``python -m loraplex.planner.study --help``.
"""

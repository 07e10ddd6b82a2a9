"""Load against an OpenAI-compatible endpoint: open loop from a trace, closed loop at a fixed concurrency, and a report.

Speaks HTTP from outside like any client; knows nothing of gateway, router or engine. Called by the CLI.
"""

"""Files behind ``pyarrow.fs`` URLs: how a URL becomes a file system, where credentials come from, what is tried again.

Knows neither adapters nor traces. Used by ``registry`` and ``traces``.
"""

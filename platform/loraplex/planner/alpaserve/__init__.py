"""Placement of whole models under AlpaServe's contract (Li et al., OSDI 2023): no batching, KV or adapters.

``search.plan`` is the entry; the commands ``plan-alpaserve`` and the tests call it.
"""

"""The cluster on a virtual clock. ``types`` is the door: one input, one result, two simulators.

``exact`` runs the real scheduler and the real routing policy; ``fast`` is a compiled model of both for searches;
``alpaserve`` is the contract of AlpaServe's simulator, to which both reduce. Pure; called by ``planner`` and ``cli``.
"""

"""A plan on real devices, without Ray: its replicas as processes, the real router, and the simulator's word beside it.

Two steps: ``prepare`` makes arrivals, plans and predictions (no accelerator needed), ``measure`` runs them.
"""

"""Request traces: one Parquet row per request, from the gateway's recorder to the controller's files and back.

``recorder`` runs in gateways, ``writer`` in the controller; ``reader``, ``arrivals`` and ``stats`` serve the CLI, the
load generator and everything that plans from traffic. Knows no HTTP, no control database and no Ray.
"""

"""Request traces: one Parquet row per request, from the gateway's recorder to the controller's files and back.

``recorder`` runs in gateways, ``writer`` in the controller; ``reader`` and ``arrivals`` serve the load generator and
everything that plans from traffic; ``stats``, ``split``, ``plot``, ``synth`` and ``convert`` are the CLI's. All of them
work on streams: a trace may be larger than memory. Knows no HTTP, no control database and no Ray.
"""

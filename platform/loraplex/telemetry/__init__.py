"""Metrics, each named once, dashboards and alerts over them, spans, the set-up of logging. Knows not who counts."""

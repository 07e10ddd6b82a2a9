"""Loraplex on Ray: Serve apps, actors, launch. The only package that imports ray."""

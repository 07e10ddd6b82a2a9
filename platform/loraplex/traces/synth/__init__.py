"""Traces made up to a recipe: popularity, arrival processes, changes over time, lengths. Bytes follow from the recipe.

``recipe`` says what, ``popularity``, ``process``, ``modulation`` and ``lengths`` do one part each, ``generate`` puts
them together. Called by the CLI and by whoever needs load of a known shape.
"""

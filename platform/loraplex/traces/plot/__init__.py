"""A trace as pictures on one HTML page that needs nothing else: ``collect`` counts, ``page`` draws.

Called by ``loraplex trace plot``.
"""

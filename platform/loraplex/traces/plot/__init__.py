"""A trace as pictures on one HTML page that needs nothing else: ``collect`` counts, ``svg`` draws, ``page`` joins.

Called by ``loraplex trace plot``.
"""

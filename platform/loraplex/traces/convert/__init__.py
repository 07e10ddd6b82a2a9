"""Public traces in their own formats, turned into ours.

``raw`` reads CSV, JSON lines, npz and Parquet as tables; each format is one small file that says which columns it has
and how its rows become ours; ``catalog`` lists them; ``mapping`` and ``counts`` do what AlpaServe does with function
traces; ``convert`` runs the whole way to a file. Called by ``loraplex trace convert``.
"""

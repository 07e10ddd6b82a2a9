"""HTML pages and charts that need nothing else: no network, no script, no library in the browser; light and dark.

Numbers and names in, text (or PNG bytes) out; knows nothing of traces, plans or loads. Called by whoever reports:
``traces.plot``, ``planner.report``, ``bench.pictures``. ``page`` has the document, ``style`` its colours;
``line_chart``, ``bar_chart``, ``grouped_bars`` and ``heat_map`` are the pictures, ``svg`` and ``scale`` what they are
drawn with, and ``png`` makes files of them.
"""

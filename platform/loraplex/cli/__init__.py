"""The ``loraplex`` command. One file per command group; all work is done over HTTP or by a part below. No Ray."""

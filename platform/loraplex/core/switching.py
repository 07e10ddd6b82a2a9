"""How long a thread of a gateway or a replica computes while another one waits.

Each has an event loop beside threads: those in which a gateway tokenizes long prompts, a replica's engine. Python lets
a thread run for 5 ms by default, a good part of a step. Called by their actors and the replicas of ``bench.fleet``.
"""

import sys

_SWITCH_S = 0.0005


def switch_often() -> None:
    """For the whole process."""
    sys.setswitchinterval(_SWITCH_S)

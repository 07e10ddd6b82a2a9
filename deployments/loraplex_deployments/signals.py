"""How a command hears that it shall end: Ctrl-C, and SIGTERM from a service manager. Called by the commands, and around
each ``ray.init``.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def on_signals(heard: Callable[[], None]) -> threading.Event:
    """Set when the user gives up. ``heard`` is called then, to say so: what is under way may take some seconds."""
    given_up = threading.Event()

    def hear(_number: int, _frame: object) -> None:
        if not given_up.is_set():
            given_up.set()
            heard()

    for number in _SIGNALS:
        signal.signal(number, hear)
    return given_up


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Handlers of ours are there again afterwards. Ray puts its own in the place of SIGTERM's, which aborts the process
    after three seconds, whatever it still has to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = {number: handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)

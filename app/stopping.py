"""Hearing that the process is to end when that is said, and not only when every request is done."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def hearing_stop(hear: Callable[[], None]) -> Iterator[None]:
    """Inside the block, call `hear` on SIGINT and SIGTERM, before the server's own handler.

    The server tells the application of its end only once all requests are done, which those that wait for something
    would hold up. Signals reach the main thread only; elsewhere nothing is heard.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        hear()
        handler = handlers[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    ours = [number for number, handler in handlers.items() if callable(handler)]
    for number in ours:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is handle:
                signal.signal(number, handlers[number])

"""Hearing that the process is to end when that is said, and not only when every request is done."""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol


class Parting(Protocol):
    """Who has to hear of the end."""

    def take_leave(self) -> None:
        """Have those told who send requests here; all goes on as it was."""

    def hurry(self) -> None:
        """Come to an end."""


@contextmanager
def hearing_stop(parting: Parting, delay_seconds: float = 0.0) -> Iterator[None]:
    """Inside the block, tell `parting` on SIGINT and SIGTERM, before the server's own handler.

    Leave is taken at once, the end comes after a delay, or with the next signal. The server tells the application of
    its end only once all requests are done, which those that wait for something would hold up. Signals reach the main
    thread only; elsewhere nothing is heard.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    is_leaving = False

    def end(number: int, frame: FrameType | None) -> None:
        parting.hurry()
        handler = handlers[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal is_leaving
        parting.take_leave()
        if is_leaving or not delay_seconds:
            end(number, frame)
        else:
            loop.call_soon_threadsafe(loop.call_later, delay_seconds, end, number, None)
        is_leaving = True

    ours = [number for number, handler in handlers.items() if callable(handler)]
    for number in ours:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is handle:
                signal.signal(number, handlers[number])


@contextmanager
def ending_with_parent() -> Iterator[None]:
    """Inside the block, come to an orderly end once the process that started this one as its worker has died.

    Otherwise it would serve on, with nobody to stop it.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        yield
        return
    loop = asyncio.get_running_loop()
    sentinel = int(parent.sentinel)

    def end() -> None:
        loop.remove_reader(sentinel)
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(sentinel, end)
    try:
        yield
    finally:
        loop.remove_reader(sentinel)

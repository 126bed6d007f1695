"""What a live client has said that was not taken up yet."""

import asyncio
from collections import deque
from collections.abc import Callable
from enum import Enum, auto

from app.bell import Bell
from app.errors import TextTooLong
from app.splitting import is_speakable

# A provider that speaks as fast as it can takes this much in a few minutes.
MAX_WAITING_CHARS = 200_000
MAX_WAITING_ITEMS = 50_000


class Mark(Enum):
    """What a client says besides text."""

    FLUSH = auto()
    END = auto()
    CANCEL = auto()


class Inbox:
    """Texts and marks in the order in which they came; texts that follow each other are taken as one."""

    def __init__(self) -> None:
        self._items: deque[str | Mark] = deque()
        self._chars = 0
        self._bell = Bell()
        self.heard_at = 0.0
        """When something was said last, by the event loop's clock."""

    def put(self, item: str | Mark) -> None:
        """Add something. Raises TextTooLong when too much waits."""
        chars = self._chars + (len(item) if isinstance(item, str) else 0)
        if chars > MAX_WAITING_CHARS or len(self._items) == MAX_WAITING_ITEMS:
            raise TextTooLong(f"等待合成的文本超过 {MAX_WAITING_CHARS} 个字符，请等已发送的文本合成后再继续")
        self._items.append(item)
        self._chars = chars
        self.heard_at = asyncio.get_running_loop().time()
        self._bell.ring()

    def clear(self) -> None:
        """Forget what was not taken up."""
        self._items.clear()
        self._chars = 0

    def wake(self) -> None:
        """Let whoever waits look whether he is to wait no more."""
        self._bell.ring()

    async def take(self, seconds: float, is_over: Callable[[], bool]) -> str | Mark | None:
        """The next text or mark; None after a while without one, or once it is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._bell.until(lambda: bool(self._items) or is_over())
        except TimeoutError:
            return None
        if is_over():
            return None
        item = self._items.popleft()
        if isinstance(item, Mark):
            return item
        texts = [item]
        while self._items and isinstance(following := self._items[0], str):
            texts.append(following)
            self._items.popleft()
        text = "".join(texts)
        self._chars -= len(text)
        return text

    async def take_speakable(self, seconds: float, is_over: Callable[[], bool]) -> list[str] | Mark | None:
        """Texts as soon as something in them can be spoken, or a mark that ends them before; like `take` else.

        Raises TextTooLong for too much that cannot be spoken.
        """
        texts: list[str] = []
        chars = 0
        while True:
            item = await self.take(seconds, is_over)
            if item is Mark.FLUSH:
                continue
            if not isinstance(item, str):
                return item
            texts.append(item)
            if is_speakable(item):
                return texts
            chars += len(item)
            if chars > MAX_WAITING_CHARS:
                raise TextTooLong(f"连续 {MAX_WAITING_CHARS} 个字符中没有可朗读的内容")

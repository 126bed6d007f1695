"""What a live client has said: taken up in order, without losing anything, and never more than there is room for."""

import asyncio

import pytest

from app.errors import TextTooLong
from app.services.inbox import MAX_WAITING_CHARS, Inbox, Mark

PATIENCE_SECONDS = 5.0


@pytest.fixture
def inbox() -> Inbox:
    """Nothing was said yet."""
    return Inbox()


@pytest.fixture
def room_for_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ten characters were a lot."""
    monkeypatch.setattr("app.services.inbox.MAX_WAITING_CHARS", 10)


def never() -> bool:
    return False


def say(inbox: Inbox, *items: str | Mark) -> None:
    for item in items:
        inbox.put(item)


async def take(inbox: Inbox) -> str | Mark | None:
    """What can be taken without waiting."""
    return await inbox.take(0, never)


async def take_all(inbox: Inbox) -> list[str | Mark]:
    taken: list[str | Mark] = []
    while (item := await take(inbox)) is not None:
        taken.append(item)
    return taken


async def settled() -> None:
    """Let everybody who can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def now() -> float:
    return asyncio.get_running_loop().time()


# ---- In order


async def test_texts_are_taken_as_one_and_marks_keep_their_place(inbox: Inbox) -> None:
    say(inbox, "一", "二", Mark.FLUSH, "三", Mark.END, Mark.CANCEL, "四", "", "五")
    assert await take_all(inbox) == ["一二", Mark.FLUSH, "三", Mark.END, Mark.CANCEL, "四五"]


async def test_what_comes_later_is_taken_later(inbox: Inbox) -> None:
    say(inbox, "一")
    assert await take(inbox) == "一"
    say(inbox, "二")
    assert await take(inbox) == "二"


async def test_what_is_cleared_is_forgotten(inbox: Inbox) -> None:
    say(inbox, "一", Mark.FLUSH, "二")
    inbox.clear()
    assert await take(inbox) is None
    say(inbox, "三")
    assert await take_all(inbox) == ["三"]


# ---- Waiting


@pytest.mark.parametrize("item", ["好", Mark.END])
async def test_who_waits_gets_what_comes_at_once(inbox: Inbox, item: str | Mark) -> None:
    waiting = asyncio.create_task(inbox.take(PATIENCE_SECONDS, never))
    await settled()
    assert not waiting.done()
    since = now()
    inbox.put(item)
    assert await waiting == item
    assert now() - since < 1


async def test_who_waits_in_vain_waits_no_longer_than_he_said(inbox: Inbox) -> None:
    since = now()
    assert await inbox.take(0.1, never) is None
    assert await inbox.take_speakable(0.1, never) is None
    assert 0.19 < now() - since < 2


async def test_once_it_is_over_nothing_is_taken(inbox: Inbox) -> None:
    say(inbox, "一", Mark.END)
    assert await inbox.take(PATIENCE_SECONDS, lambda: True) is None
    assert await inbox.take_speakable(PATIENCE_SECONDS, lambda: True) is None
    assert await take_all(inbox) == ["一", Mark.END]


async def test_who_is_woken_waits_on_unless_it_is_over(inbox: Inbox) -> None:
    is_over = False
    waiting = asyncio.create_task(inbox.take(PATIENCE_SECONDS, lambda: is_over))
    await settled()
    inbox.wake()
    await settled()
    assert not waiting.done()
    is_over = True
    await settled()
    assert not waiting.done()
    since = now()
    inbox.wake()
    assert await waiting is None
    assert now() - since < 1


# ---- Limits


async def test_too_much_text_is_refused(inbox: Inbox) -> None:
    say(inbox, "一" * MAX_WAITING_CHARS)
    with pytest.raises(TextTooLong, match=str(MAX_WAITING_CHARS)):
        inbox.put("二")
    assert await take_all(inbox) == ["一" * MAX_WAITING_CHARS]


@pytest.mark.usefixtures("room_for_ten")
async def test_the_limit_is_for_what_waits_at_a_moment(inbox: Inbox) -> None:
    say(inbox, "一" * 4, Mark.FLUSH, "二" * 3, "三" * 3)
    with pytest.raises(TextTooLong):
        inbox.put("四")
    inbox.clear()
    say(inbox, "一" * 4, Mark.FLUSH, "二" * 3, "三" * 3, Mark.END)
    assert await take(inbox) == "一" * 4
    say(inbox, "四" * 4)
    assert await take_all(inbox) == [Mark.FLUSH, "二" * 3 + "三" * 3, Mark.END, "四" * 4]
    say(inbox, "五" * 10)


@pytest.mark.usefixtures("room_for_ten")
async def test_what_was_refused_takes_no_room(inbox: Inbox) -> None:
    with pytest.raises(TextTooLong):
        inbox.put("一" * 11)
    say(inbox, "二" * 10)
    assert await take_all(inbox) == ["二" * 10]


async def test_too_many_items_are_refused(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.services.inbox.MAX_WAITING_ITEMS", 3)
    say(inbox, "一", Mark.FLUSH, "")
    for item in ("", "二", Mark.FLUSH):
        with pytest.raises(TextTooLong):
            inbox.put(item)
    assert await take(inbox) == "一"
    say(inbox, Mark.END)
    assert await take_all(inbox) == [Mark.FLUSH, "", Mark.END]


# ---- What can be spoken


async def test_texts_are_kept_until_one_can_be_spoken(inbox: Inbox) -> None:
    say(inbox, " \n", Mark.FLUSH, "——", Mark.FLUSH, Mark.FLUSH, "你好", "！", Mark.FLUSH, "再见")
    assert await inbox.take_speakable(0, never) == [" \n", "——", "你好！"]
    assert await take_all(inbox) == [Mark.FLUSH, "再见"]


@pytest.mark.parametrize("text", ["好", "a", "7", "é", "か"])
async def test_blanks_alone_begin_nothing(inbox: Inbox, text: str) -> None:
    waiting = asyncio.create_task(inbox.take_speakable(PATIENCE_SECONDS, never))
    for blank in (" ", "…", "。\n"):
        inbox.put(blank)
        await settled()
        assert not waiting.done()
    inbox.put(text)
    assert await waiting == [" ", "…", "。\n", text]


@pytest.mark.parametrize("mark", [Mark.END, Mark.CANCEL])
async def test_a_mark_comes_before_what_follows_it(inbox: Inbox, mark: Mark) -> None:
    say(inbox, mark, " ", Mark.FLUSH, mark, "好")
    assert await inbox.take_speakable(0, never) is mark
    assert await inbox.take_speakable(0, never) is mark
    assert await inbox.take_speakable(0, never) == ["好"]


async def test_blanks_without_a_sequel_come_to_nothing(inbox: Inbox) -> None:
    say(inbox, " ", Mark.FLUSH)
    assert await inbox.take_speakable(0.01, never) is None
    say(inbox, "好")
    assert await inbox.take_speakable(0, never) == ["好"]


@pytest.mark.usefixtures("room_for_ten")
async def test_too_much_that_cannot_be_spoken_is_refused(inbox: Inbox) -> None:
    waiting = asyncio.create_task(inbox.take_speakable(PATIENCE_SECONDS, never))
    for blanks in (6, 4, 1):
        await settled()
        assert not waiting.done()
        say(inbox, " " * blanks, Mark.FLUSH)
    with pytest.raises(TextTooLong, match="10"):
        await waiting


@pytest.mark.usefixtures("room_for_ten")
async def test_as_much_as_may_wait_may_be_blank(inbox: Inbox) -> None:
    waiting = asyncio.create_task(inbox.take_speakable(PATIENCE_SECONDS, never))
    for text in (" " * 6, " " * 4, "好" * 10):
        inbox.put(text)
        await settled()
    assert await waiting == [" " * 6, " " * 4, "好" * 10]


# ---- When


async def test_it_is_known_when_something_was_said_last(inbox: Inbox) -> None:
    assert inbox.heard_at == 0
    for item in ("好", Mark.FLUSH, " "):
        before = now()
        inbox.put(item)
        assert before <= inbox.heard_at <= now()
        await asyncio.sleep(0.01)
    heard_at = inbox.heard_at
    inbox.wake()
    await take(inbox)
    inbox.clear()
    assert inbox.heard_at == heard_at

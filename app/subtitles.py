"""Subtitles from recognised speech: cues of readable lines, written as SRT, WebVTT or plain text. Pure.

Offsets are characters of a sentence's text; widths are in units of which 3 make a Latin and 7 a Chinese character.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import accumulate, pairwise, zip_longest
from typing import NamedTuple

# The frame that professional guides set: 42 Latin or 18 Chinese characters a line, two lines, 5/6 to 7 seconds.
NARROW, WIDE, LINE_WIDTH = 3, 7, 126
SHORTEST_CUE_MS, LONGEST_CUE_MS = 833, 7000

# What makes a layout worse; the cheapest one is taken.
AT_SENTENCE_END, AT_CLAUSE_END, AT_BLANK, AT_WORD, AT_CHARACTER, AT_PARTICLE = 0.0, 0.1, 1.0, 1.5, 2.2, 3.0
AT_SIGN, IN_WORD = 10.0, 20.0  # only in what is too wide for a line
ANOTHER_CUE = 0.3
SLACK = 0.4

SENTENCE_ENDS = "。．.！!？?…"
CLAUSE_ENDS = "，,、；;：:—"
QUOTES = "\"'"
DECIMAL_SIGNS = "．："
# Beside brackets: what begins no line, the small kana among them, and what ends none.
SMALL_KANA = "ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶー々ゝゞヽヾ"
NEVER_FIRST = frozenset(SENTENCE_ENDS + CLAUSE_ENDS + SMALL_KANA + "·・%％‰℃～〜-/")
NEVER_LAST = frozenset("￥＄￡＃＠")
CLOSING_QUOTES = " \"'”’」』）)》】"
# Chinese particles lean on the word before them.
PARTICLES = frozenset("的地得了着过们吗呢吧啊呀嘛")
# Parts of a visible character that are told neither by their category nor by what precedes them.
SKIN_TONES_AND_JAMO = frozenset(map(chr, (*range(0x1F3FB, 0x1F400), *range(0x1160, 0x1200))))
FLAG_LETTERS = "".join(map(chr, range(0x1F1E6, 0x1F200)))
JOINER = "\u200d"

# SRT knows no escapes. What a player would take for a tag or an arrow is written with its full-width twin.
SRT_MARKUP = re.compile(r"<(?=[^<>]*>)|[{}]|(?<=--)>")
FULL_WIDTH = str.maketrans("<>{}", "＜＞｛｝")
VTT_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


@dataclass(frozen=True, slots=True)
class Word:
    """A word, or a single Chinese character, and the punctuation that follows it, if any."""

    begin_ms: int
    end_ms: int
    text: str
    punctuation: str = ""


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence: its text is what is shown, its words tell when."""

    begin_ms: int
    end_ms: int
    text: str
    words: tuple[Word, ...] = ()


@dataclass(frozen=True, slots=True)
class Track:
    """Everything said on one channel."""

    channel_id: int
    sentences: tuple[Sentence, ...]


@dataclass(frozen=True, slots=True)
class Cue:
    """One or two lines that are shown together."""

    begin_ms: int
    end_ms: int
    lines: tuple[str, ...]
    channel_id: int


def make_cues(track: Track) -> list[Cue]:
    """Lay out a channel in cues, by time; they never overlap, whatever the times of the sentences.

    Only blanks and control characters of the text change. A cue lasts as long as its words, at least
    SHORTEST_CUE_MS where the next one leaves room, at most LONGEST_CUE_MS.
    """
    sentences = sorted(track.sentences, key=lambda sentence: sentence.begin_ms)
    return _one_after_another([cue for sentence in sentences for cue in _lay_out(sentence, track.channel_id)])


def write_srt(cues: Iterable[Cue]) -> str:
    """Write cues as SubRip, with LF; each names its channel when there are several."""
    blocks = []
    for number, (cue, channel) in enumerate(_by_time(cues), 1):
        text = SRT_MARKUP.sub(lambda found: found[0].translate(FULL_WIDTH), "\n".join(cue.lines))
        label = f"[{channel}] " if channel else ""
        blocks.append(f"{number}\n{_period(cue, ',')}\n{label}{text}\n")
    return "\n".join(blocks)


def write_vtt(cues: Iterable[Cue]) -> str:
    """Write cues as WebVTT; each has its channel as the voice when there are several."""
    blocks = ["WEBVTT\n"]
    for cue, channel in _by_time(cues):
        text = "\n".join(cue.lines).translate(VTT_ESCAPES)
        voice = f"<v {channel}>" if channel else ""
        blocks.append(f"{_period(cue, '.')}\n{voice}{text}\n")
    return "\n".join(blocks)


def write_txt(tracks: Iterable[Track]) -> str:
    """Write one sentence a line, under a heading for each channel when several have something to say."""
    spoken = {track.channel_id: [text for each in track.sentences if (text := _clean(each.text))] for track in tracks}
    spoken = {channel_id: texts for channel_id, texts in spoken.items() if texts}
    headed = len(spoken) > 1
    parts = [[_channel_name(channel_id), *texts] if headed else texts for channel_id, texts in spoken.items()]
    return "\n".join("".join(f"{line}\n" for line in part) for part in parts)


# ---- Documents


def _by_time(cues: Iterable[Cue]) -> Iterator[tuple[Cue, str]]:
    """Cues of all channels by time, each with the name of its channel; without a name when there is only one."""
    ordered = sorted(cues, key=lambda cue: (cue.begin_ms, cue.channel_id))
    several = len({cue.channel_id for cue in ordered}) > 1
    for cue in ordered:
        yield cue, _channel_name(cue.channel_id) if several else ""


def _channel_name(channel_id: int) -> str:
    return f"声道 {channel_id}"


def _period(cue: Cue, point: str) -> str:
    return f"{_timestamp(cue.begin_ms, point)} --> {_timestamp(cue.end_ms, point)}"


def _timestamp(time_ms: int, point: str) -> str:
    seconds, milliseconds = divmod(time_ms, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{milliseconds:03}"


# ---- Cues


def _one_after_another(cues: Sequence[Cue]) -> list[Cue]:
    """The same cues with times that move forward: a cue that does not begin after the one before has to wait."""
    begins_ms: list[int] = []
    for cue in cues:
        follows = not begins_ms or cue.begin_ms > begins_ms[-1]
        begins_ms.append(max(0, cue.begin_ms) if follows else begins_ms[-1] + SHORTEST_CUE_MS)
    moved: list[Cue] = []
    for cue, begin_ms, next_ms in zip_longest(cues, begins_ms, begins_ms[1:]):
        end_ms = min(max(cue.end_ms, begin_ms + SHORTEST_CUE_MS), begin_ms + LONGEST_CUE_MS)
        moved.append(replace(cue, begin_ms=begin_ms, end_ms=min(end_ms, next_ms or end_ms)))
    return moved


class _Break(NamedTuple):
    """Where a line may end: what that costs, how wide the text is up to here, and when it is said."""

    offset: int
    cost: float
    width: int
    width_shown: int  # without the blank that a break here swallows
    begin_ms: int  # of what follows
    end_ms: int  # of what precedes


class _Path(NamedTuple):
    """The cheapest layout up to a break, from its last line backwards."""

    cost: float
    cue: _Break
    line: _Break
    end: _Break
    before: "_Path | None"


def _lay_out(sentence: Sentence, channel_id: int) -> list[Cue]:
    """Cut a sentence into cues that are timed by its words."""
    text = _clean(sentence.text)
    if not text:
        return []
    at = _widths_at(text)
    speech = _align(text, at, sentence)
    breaks = [
        _Break(offset, cost, at[offset], at[shown_end], speech.begins_ms[offset], speech.ends_ms[offset])
        for offset, cost in _break_costs(text, at, speech.word_offsets)
        for shown_end in [offset - (text[offset - 1 : offset] == " ")]
    ]
    cues: list[Cue] = []
    for path in _cheapest_lines(breaks):
        line = text[path.line.offset : path.end.offset].strip()
        lines = (line,) if path.line is path.cue else (*cues.pop().lines, line)
        cues.append(Cue(path.cue.begin_ms, path.end.end_ms, lines, channel_id))
    return cues


def _cheapest_lines(breaks: Sequence[_Break]) -> list[_Path]:
    """Choose the breaks to use, by the least sum of costs of all layouts that fit.

    What lies between two neighbouring breaks always makes a line, however long it is said.
    """
    origin = breaks[0]
    start = _Path(0.0, origin, origin, origin, None)
    cheapest = [start]
    with_room: list[_Path | None] = [None]  # layouts whose last cue has one line so far
    for index, end in enumerate(breaks[1:]):
        opening: list[_Path] = []
        closing: list[_Path] = []
        for previous in range(index, -1, -1):
            line = breaks[previous]
            width = end.width_shown - line.width
            too_long = end.end_ms - line.begin_ms > LONGEST_CUE_MS
            if previous < index and (width > LINE_WIDTH or too_long):
                break
            cost = line.cost + SLACK * (1 - width / LINE_WIDTH) ** 2
            before, first = cheapest[previous], with_room[previous]
            opening.append(_Path(before.cost + cost + ANOTHER_CUE, line, line, end, before))
            if first and end.end_ms - first.cue.begin_ms <= LONGEST_CUE_MS:
                closing.append(_Path(first.cost + cost, first.cue, line, end, first))
        with_room.append(min(opening, key=lambda path: path.cost))
        cheapest.append(min(opening + closing, key=lambda path: path.cost))
    lines = [cheapest[-1]]
    while (path := lines[-1].before) and path.before:
        lines.append(path)
    return lines[::-1]


# ---- Times


class _Speech(NamedTuple):
    """When a text is said: what begins at each offset, and what ends there. And where its words begin."""

    begins_ms: list[int]
    ends_ms: list[int]
    word_offsets: set[int]

    def say(self, begin: int, end: int, since_ms: int, until_ms: int, at: Sequence[int]) -> None:
        """Spread a stretch of text over a time, each character by its width."""
        pace = (until_ms - since_ms) / max(1, at[end] - at[begin])
        times_ms = [since_ms + round(pace * (width - at[begin])) for width in at[begin : end + 1]]
        self.begins_ms[begin:end] = times_ms[:-1]
        self.ends_ms[begin + 1 : end + 1] = times_ms[1:]


class _Heard(NamedTuple):
    """A sound of a word, with its share of the word's time."""

    sound: str
    begin_ms: int
    end_ms: int
    begins_word: bool


def _align(text: str, at: Sequence[int], sentence: Sentence) -> _Speech:
    """Tell when each part of a text is said.

    Words that are not in the text as such lend their time to what stands there instead. Without a single word
    in common, the text is spread over the time of the sentence.
    """
    begin_ms, end_ms = sentence.begin_ms, sentence.end_ms
    if begin_ms >= end_ms and sentence.words:
        begin_ms = min(word.begin_ms for word in sentence.words)
        end_ms = max(word.end_ms for word in sentence.words)
    speech = _Speech([0] * (len(text) + 1), [0] * (len(text) + 1), set())
    sounds = _sounds(text)
    offsets = [*sounds, len(text)]
    heard = list(_heard(sentence.words, begin_ms, end_ms))
    begins_ms = [*(each.begin_ms for each in heard), end_ms]
    ends_ms = [begin_ms, *(each.end_ms for each in heard)]
    pairs = SequenceMatcher(None, [each.sound for each in heard], [*sounds.values()])
    for kind, first, last, begin, end in pairs.get_opcodes():
        if kind == "equal":
            for each, (offset, until) in zip(heard[first:last], pairwise(offsets[begin : end + 1]), strict=True):
                speech.say(offset, until, each.begin_ms, each.end_ms, at)
                if each.begins_word:
                    speech.word_offsets.add(offset)
        elif begin < end:
            instead = (begins_ms[first], ends_ms[last]) if first < last else (ends_ms[first], begins_ms[last])
            speech.say(offsets[begin], offsets[end], *instead, at)
    if not speech.word_offsets:
        speech.say(0, len(text), begin_ms, end_ms, at)
    return speech


def _heard(words: Iterable[Word], begin_ms: int, end_ms: int) -> Iterator[_Heard]:
    """The words whose times lie within the bounds and move forward, sound by sound."""
    for word in words:
        if begin_ms <= word.begin_ms < word.end_ms <= end_ms:
            begin_ms = word.begin_ms
            sounds = _sounds(_clean(word.text)).values()
            step_ms = (word.end_ms - word.begin_ms) / max(1, len(sounds))
            for index, sound in enumerate(sounds):
                since_ms = word.begin_ms + index * step_ms
                yield _Heard(sound, round(since_ms), round(since_ms + step_ms), begins_word=index == 0)


def _sounds(text: str) -> dict[int, str]:
    """The parts of a text that can be heard, by their offsets; signs go with what precedes them."""
    sounds: dict[int, str] = {}
    for begin, end in pairwise(_break_offsets(text)):
        sound = "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text[begin:end]).casefold()))
        if sound:
            sounds[begin if sounds else 0] = sound
    return sounds


# ---- Text


def _clean(text: str) -> str:
    """One line of what can be shown: runs of blanks, line ends and control characters become one blank."""
    return " ".join("".join(" " if unicodedata.category(each) in {"Cc", "Cs"} else each for each in text).split())


def _widths_at(text: str) -> list[int]:
    """How wide the text is up to each offset."""
    is_wide = (char in FLAG_LETTERS or unicodedata.east_asian_width(char) in "WF" for char in text)
    widths = (0 if _continues(text, offset) else WIDE if wide else NARROW for offset, wide in enumerate(is_wide))
    return list(accumulate(widths, initial=0))


def _break_offsets(text: str) -> list[int]:
    """Where lines may begin and end, the ends of the text included."""
    return [0, *(offset for offset in range(1, len(text)) if _may_break(text, offset)), len(text)]


def _break_costs(text: str, at: Sequence[int], word_offsets: Set[int]) -> Iterator[tuple[int, float]]:
    """Where lines may begin and end, and what that costs; what is too wide for a line breaks anywhere in need."""
    for begin, end in pairwise(_break_offsets(text)):
        yield begin, _break_cost(text, begin, word_offsets) if begin else 0.0
        if at[end] - at[begin] > LINE_WIDTH:
            for offset in range(begin + 1, end):
                if text[offset] != " " and not _continues(text, offset):
                    yield offset, _emergency_cost(text, offset)
    yield len(text), 0.0


def _break_cost(text: str, offset: int, word_offsets: Set[int]) -> float:
    before, after = text[offset - 1], text[offset]
    sign = text[max(0, offset - 4) : offset].rstrip(CLOSING_QUOTES)[-1:]
    if sign and sign in SENTENCE_ENDS:
        return AT_SENTENCE_END
    if sign and sign in CLAUSE_ENDS:
        return AT_CLAUSE_END
    if before == " ":
        return AT_BLANK
    if after in PARTICLES:
        return AT_PARTICLE
    scripts_meet = _is_ideographic(before) != _is_ideographic(after) and not before.isdigit()
    return AT_WORD if scripts_meet or offset in word_offsets else AT_CHARACTER


def _emergency_cost(text: str, offset: int) -> float:
    before, after = text[offset - 1], text[offset]
    return IN_WORD if before.isalnum() or _ends_no_line(before) or _begins_no_line(after) else AT_SIGN


def _may_break(text: str, offset: int) -> bool:
    before, after = text[offset - 1], text[offset]
    if after == " " or _continues(text, offset) or _begins_no_line(after):
        return False
    if before == " ":
        return not _ends_no_line(text[offset - 2])
    if _ends_no_line(before) or before in QUOTES or after in QUOTES:
        return False
    if before in DECIMAL_SIGNS and after.isdigit():
        return not text[offset - 2 : offset - 1].isdigit()
    return _is_ideographic(before) or _is_ideographic(after)


def _begins_no_line(char: str) -> bool:
    return char in NEVER_FIRST or unicodedata.category(char) in {"Pe", "Pf"}


def _ends_no_line(char: str) -> bool:
    return char in NEVER_LAST or unicodedata.category(char) in {"Ps", "Pi"}


def _is_ideographic(char: str) -> bool:
    """Whether lines may break beside a character: wide ones, but for the full-width twins of Latin letters."""
    width = unicodedata.east_asian_width(char)
    return width == "W" or (width == "F" and not char.isalnum())


def _continues(text: str, offset: int) -> bool:
    """Whether the character is part of the one before: an accent, a half flag, the next of a family of emoji."""
    char = text[offset]
    if char in FLAG_LETTERS:
        return (offset - len(text[:offset].rstrip(FLAG_LETTERS))) % 2 == 1
    joined = offset > 0 and text[offset - 1] == JOINER
    return joined or char in SKIN_TONES_AND_JAMO or unicodedata.category(char) in {"Mn", "Mc", "Me", "Cf"}

"""Long text in segments that can be spoken one by one and sound as if they were one. Pure.

Segments are counted as the provider bills; joined, they are the text as it was written. To find where it may be cut, a
text is read by its shape: the same text with fewer kinds of characters.
"""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise

from app.catalog import count_characters

MAX_SEGMENT_CHARACTERS = 2000
LAST_SEGMENT_CHARACTERS = 800
MANY_SEGMENTS = 3  # for each that is spoken at once
SHORTEST_SEGMENT_CHARACTERS = 100  # less is put with a neighbour where that can be

# How well a text can be cut at an offset; the best within reach is taken.
IN_PIECE, AT_SIGN, AT_CHARACTER, AT_BLANK, AT_CLAUSE, AT_SENTENCE = range(6)

# Kinds that many characters share in a shape; all of ASCII but the blanks stands there as it is.
LETTER, DIGIT, IDEOGRAPH, SYMBOL, EXTENDER, FLAG_LETTER, OPENING, CLOSING = "a0中☺\u0301\U0001f1e6（）"
KINDS = {"L": LETTER, "N": DIGIT, "S": SYMBOL, "Cn": SYMBOL, "M": EXTENDER, "Cf": EXTENDER}
KINDS |= {"Ps": OPENING, "Pi": OPENING, "Pe": CLOSING, "Pf": CLOSING}
LINE_ENDS = "\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
SENTENCE_SIGNS = "。｡！？；…‥⋯!?;‼⁇⁈⁉؟؛۔।॥"
CLAUSE_SIGNS = "，,、､：:—–―،"
# Parts of a visible character that are told by neither their category nor their place.
EXTENDERS = re.compile("[\u0e33\u0eb3\u1160-\u11ff\ud7b0-\ud7ff\U0001f3fb-\U0001f3ff]")
KANA_AND_BOPOMOFO = re.compile("[\u3031-\u3035\u3040-\u30fa\u30fc-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f]")

_EXTENDED = "[\u0301\u200d]*+"
_WORD_CHARACTER = "[A-Za-z0-9_\u0301\u200d]"
_CHARACTER = rf"\U0001f1e6{{1,2}}{_EXTENDED}|☺{_EXTENDED}(?:(?<=\u200d)☺{_EXTENDED})*+|.{_EXTENDED}"
# What is never cut unless it is too long for a segment. No alternative reads further than it takes, but for a few
# characters: this keeps the reading linear.
_PIECE = re.compile(
    rf"""
    (?P<ideograph>中{_EXTENDED})
    |(?P<blank>[ \r\n][ \r\n\u0301\u200d]*+)
    |(?P<address>
        (?:[A-Za-z][A-Za-z0-9+.-]{{0,15}}+://
           |(?:[A-Za-z0-9-]{{1,63}}+\.){{1,9}}[A-Za-z]{{2,24}}(?::[0-9]{{1,5}})?[/?\#])
        [!\#-;=?-_a-~]*[A-Za-z0-9/_~=&%\#+-]{_EXTENDED})
    |(?P<sentence>(?:[{SENTENCE_SIGNS}]|[.．]{{3,}})[{SENTENCE_SIGNS}.．\u0301\u200d]*+)
    |(?P<clause>(?:[{CLAUSE_SIGNS}]|--)[{CLAUSE_SIGNS}\u0301\u200d-]*+)
    |(?P<word>
        (?:[-+\#@$€£¥￥]{{1,2}}\.?(?=[A-Za-z0-9])|\.(?=[0-9]))?
        {_WORD_CHARACTER}++
        (?:(?:[-‑–.．·'’&@+%~/=]
              |(?<=[0-9])(?:[,:：](?=[0-9])|，(?=[0-9]{{3}}(?![0-9]))|中{_EXTENDED}(?=[0-9])))
           {_WORD_CHARACTER}++)*+
        (?:(?<=[0-9])(?:[%‰％]{_EXTENDED}|(?=[中☺])(?:{_CHARACTER})))?)
    |(?P<stop>[.．]++{_EXTENDED})
    |(?P<opening>[(\[{{（]{_EXTENDED})|(?P<closing>[)\]}}）’]{_EXTENDED})
    |(?P<quote>["'＂＇]{_EXTENDED})|(?P<joint>[·・‧]{_EXTENDED})
    |(?P<character>{_CHARACTER})
    """,
    re.VERBOSE | re.DOTALL,
)
_GRAPHEME = re.compile(rf"\r\n|{_CHARACTER}", re.DOTALL)
# How well one can cut after pieces that lean on what precedes, and after those that stand alone, both at least.
_LEANING = {"joint": AT_SIGN, "closing": AT_CHARACTER, "blank": AT_BLANK, "clause": AT_CLAUSE, "sentence": AT_SENTENCE}
_STANDING = frozenset({"ideograph", "address", "word", "character"})

# A full stop ends a sentence before these only, and not after an abbreviation, an initial or the number of an item.
_BLANKS = frozenset({"", " ", "\r", "\n"})
_AFTER_STOP = _BLANKS | frozenset(")]}）’\"'＂＇中")
_ABBREVIATION = re.compile(
    r"(?:[^\W\d_]\.)*[^\W\d_]|ph\.d|mr|mrs|ms|dr|prof|rev|hon|gen|col|maj|capt|lt|sgt|st|mt|jr|sr|messrs|mme|mlle"
    r"|vs|etc|approx|est|dept|inc|ltd|co|corp|bros|ave|blvd|rd|cf|al|ca|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"nos?|figs?|vols?|pp?|secs?|ch|art|eq|tel|ext", re.IGNORECASE)
_NUMBER_FOLLOWS = re.compile(r" {0,4}[#(]?[0-9]")


def split_text(text: str, at_once: int = 1) -> list[str]:
    """Cut plain text into segments of at most MAX_SEGMENT_CHARACTERS, none of them empty.

    Each is as long as fits up to a sentence end; where there is none, up to a comma, a blank or any character. Visible
    characters, numbers, words and addresses stay whole unless they are too long themselves. Of a very long text that is
    spoken several segments `at_once`, the last ones are shorter, so that little is left to be done after the last.
    """
    cuts = Cutter(text, (counts_of(text), MAX_SEGMENT_CHARACTERS), at_once=at_once).cut()
    return [text[begin:end] for begin, end in pairwise(cuts)]


def is_speakable(text: str) -> bool:
    """Whether there is a letter or a digit of any script."""
    return any(unicodedata.category(char)[0] in "LN" for char in text)


def is_silent(text: str) -> bool:
    """Whether there is nothing but blanks and punctuation."""
    return all(unicodedata.category(char)[0] in "ZPC" for char in text)


def counts_of(text: str) -> Iterator[int]:
    """What each character counts."""
    counts = {char: count_characters(char) for char in set(text)}
    return map(counts.__getitem__, text)


# ---- Cutting


class Cutter:
    """Chooses where to cut. A limit is the sizes of all characters and the room for them; the first is the count."""

    def __init__(self, text: str, *limits: tuple[Iterable[int], int], at_once: int = 1) -> None:
        self._text, self._at_once = text, at_once
        self._limits = [(list(accumulate(sizes, initial=0)), room) for sizes, room in limits]
        self._at, _ = self._limits[0]
        self._breaks = _find_breaks(text, self._reach)

    def cut(self) -> list[int]:
        """The offsets where segments begin and end."""
        cuts = [0]
        while cuts[-1] < len(self._text):
            cuts.append(self._end_of_segment(cuts[-1]))
        return self._without_crumbs(cuts)

    def _reach(self, begin: int) -> int:
        reach = min(bisect_right(at, at[begin] + room) for at, room in self._limits) - 1
        if self._at_once == 1 or self._at[-1] < MANY_SEGMENTS * self._at_once * MAX_SEGMENT_CHARACTERS:
            return reach
        share = (self._at[-1] - self._at[begin]) // (self._at_once + 1)
        return min(reach, bisect_right(self._at, self._at[begin] + max(share, LAST_SEGMENT_CHARACTERS)) - 1)

    def _end_of_segment(self, begin: int) -> int:
        reach = self._reach(begin)
        if reach == len(self._text):
            return reach
        enough = bisect_left(self._at, self._at[begin] + SHORTEST_SEGMENT_CHARACTERS, begin + 1)
        for least in (enough, begin + 1):
            for ends in reversed(self._breaks):
                index = bisect_right(ends, reach)
                if index and ends[index - 1] >= least:
                    return ends[index - 1]
        return reach

    def _without_crumbs(self, cuts: Sequence[int]) -> list[int]:
        """Put what is too short or cannot be spoken with a neighbour, or move the cut between the two."""
        kept = [0]
        for end in cuts[1:]:
            if len(kept) > 1 and (self._is_crumb(kept[-2], kept[-1]) or self._is_crumb(kept[-1], end)):
                if end <= self._reach(kept[-2]):
                    kept.pop()
                else:
                    kept[-1] = self._balance(kept[-2], kept[-1], end)
                    if len(kept) > 2 and kept[-1] <= self._reach(kept[-3]):
                        del kept[-2]
            kept.append(end)
        return kept

    def _is_crumb(self, begin: int, end: int) -> bool:
        return self._at[end] - self._at[begin] < SHORTEST_SEGMENT_CHARACTERS or not is_speakable(self._text[begin:end])

    def _balance(self, begin: int, cut: int, end: int) -> int:
        """The cut nearest to the middle that leaves no crumb: at a sentence end or a comma, or else as good as the
        present one unless it leaves what cannot be spoken; that stays if there is no other.
        """
        spoken = [offset for offset in range(begin, end) if is_speakable(self._text[offset])] or [end, begin]
        shortest = bisect_left(self._at, self._at[begin] + SHORTEST_SEGMENT_CHARACTERS)
        longest = bisect_right(self._at, self._at[end] - SHORTEST_SEGMENT_CHARACTERS) - 1
        first = max(shortest, spoken[0] + 1, begin + bisect_left(range(begin, end), end, key=self._reach))
        last = min(longest, spoken[-1], self._reach(begin))
        middle = (self._at[begin] + self._at[end]) / 2
        is_as_good = False
        is_spoken = is_speakable(self._text[begin:cut]) and is_speakable(self._text[cut:end])
        for level, offsets in reversed([*enumerate(self._breaks)]):
            choice = offsets[bisect_left(offsets, first) : bisect_right(offsets, last)]
            if choice:
                return min(choice, key=lambda offset: abs(self._at[offset] - middle))
            is_as_good = is_as_good or (is_spoken and bisect_left(offsets, cut) < bisect_right(offsets, cut))
            if is_as_good and level <= AT_CLAUSE:
                break
        return cut if is_spoken or first > last else last


# ---- Where text may be cut


def _find_breaks(text: str, reach: Callable[[int], int]) -> list[list[int]]:
    """The offsets at which a text may be cut, by how well."""
    shape = text.translate({ord(char): _kind(char) for char in set(text)})
    breaks: list[list[int]] = [[] for _ in range(AT_SENTENCE + 1)]
    level, line_begin, word_begin = AT_SIGN, 0, 0
    open_quotes: set[str] = set()
    for piece in _PIECE.finditer(shape):
        begin, end = piece.span()
        kind = piece.lastgroup
        if kind == "stop":
            kind = "sentence" if _ends_sentence(text, shape, word_begin, piece, line_begin) else "joint"
        elif kind == "quote":
            after_blank, before_blank = shape[begin - 1 : begin] in _BLANKS, shape[end : end + 1] in _BLANKS
            closes = not after_blank if after_blank != before_blank else shape[begin] in open_quotes
            kind = "closing" if closes else "opening"
            (open_quotes.discard if closes else open_quotes.add)(shape[begin])
        leans = kind in _LEANING and begin > line_begin
        breaks[AT_SIGN if leans else level].append(begin)
        if end - begin > 1 and end > reach(begin):
            breaks[IN_PIECE].extend(grapheme.start() for grapheme in _GRAPHEME.finditer(shape, begin, end))
        if kind == "blank" and ("\n" in piece[0] or "\r" in piece[0]):
            level, line_begin = AT_SENTENCE, end
            open_quotes.clear()
        elif kind and leans and kind != "joint":
            level = max(level, _LEANING[kind])
        else:
            level = AT_CHARACTER if kind in _STANDING else AT_SIGN
        word_begin = begin if kind == "word" else end
    return breaks


def _kind(char: str) -> str:
    """What a character is in a shape: one for many, or itself."""
    if char.isspace():
        return "\n" if char in LINE_ENDS else char if char == "\r" else " "
    category = unicodedata.category(char)
    if char.isascii() or char in SENTENCE_SIGNS or char in "’\u200b\u200d" or category == "Sc":
        return char
    if EXTENDERS.match(char):
        return EXTENDER
    if "\U0001f1e6" <= char <= "\U0001f1ff":
        return FLAG_LETTER
    if count_characters(char) > 1 or (category[0] == "L" and KANA_AND_BOPOMOFO.match(char)):
        return IDEOGRAPH
    return KINDS.get(category) or KINDS.get(category[0]) or char


def _ends_sentence(text: str, shape: str, word_begin: int, stop: re.Match[str], line_begin: int) -> bool:
    """Whether full stops end a sentence, and no abbreviation or number."""
    begin, end = stop.span()
    if shape[end : end + 1] not in _AFTER_STOP:
        return False
    word = text[word_begin:begin]
    is_number_sign = _NUMBERED.fullmatch(word) and _NUMBER_FOLLOWS.match(shape, end)
    return not (is_number_sign or _ABBREVIATION.fullmatch(word) or (word_begin == line_begin and word.isdecimal()))

"""Long SSML in segments that can be spoken one by one (PROTOCOL §1.9). Pure.

A document is read by positions in bytes, so that every segment is in the words of the text.
"""

import re
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from xml.parsers import expat

from app.catalog import count_characters
from app.errors import InvalidRequest
from app.splitting import EXTENDER, IDEOGRAPH, MAX_SEGMENT_CHARACTERS, SYMBOL, Cutter, counts_of, is_speakable

MAX_SSML_SEGMENT_CHARS = 20_000  # tags included, which count nothing
MAX_SSML_DEPTH = 50
WRAPPER_BEGIN, WRAPPER_END = b"<_>\n", b"</_>"
IN_WRAPPER, IN_SPEAK = 1, 2  # how many elements are open
DECLARATION = re.compile(rb"<(?:\?|!(?:DOCTYPE|ENTITY|ELEMENT|ATTLIST|NOTATION))")
# How a child of <speak> is cut: text as it stands, and a reference as the character that it stands for.
AS_TEXT, AS_WORD, AS_SOUND, AS_PAUSE, AS_NOTHING = "", IDEOGRAPH, SYMBOL, "、", EXTENDER


def split_ssml(text: str) -> list[str]:
    """Cut SSML into segments that are each one or several complete speak elements, all in the words of the text.

    Cuts are only between what stands directly in a speak element, and in its text as in `split_text`. Each part has the
    tag of the whole. Small speak elements that follow each other share a segment.

    Raises InvalidRequest for what is not SSML and for what cannot be cut.
    """
    source = WRAPPER_BEGIN + text.encode(errors="surrogatepass") + WRAPPER_END
    speaks = _Reader(source).read()
    if _is_short(count_characters(text, ssml=True), len(text)):
        return [text]
    segments: list[list[str]] = []
    characters = length = 0
    for speak in speaks:
        for index, part in enumerate(_split_speak(source, speak)):
            more = count_characters(part, ssml=True)
            if index or not segments or not _is_short(characters + more, length + len(part)):
                segments.append([])
                characters = length = 0
            segments[-1].append(part)
            characters, length = characters + more, length + len(part)
    return ["".join(parts) for parts in segments]


@dataclass(slots=True)
class _Speak:
    """A speak element by its positions in bytes; of what stands directly in it, where it begins and how it is cut."""

    start: int
    line: int
    has_music: bool
    children: list[tuple[int, str]] = field(default_factory=list)
    inner_end: int = 0
    end: int = 0


class _Reader:
    """Finds the speak elements of a document that is wrapped, so that it has a single root."""

    def __init__(self, source: bytes) -> None:
        self._source = source
        self._speaks: list[_Speak] = []
        self._depth = 0
        self._in_cdata = False
        self._parser = expat.ParserCreate("utf-8")
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text
        self._parser.StartCdataSectionHandler = self._switch_cdata
        self._parser.EndCdataSectionHandler = self._switch_cdata
        self._parser.CommentHandler = lambda _: self._add_child(AS_NOTHING)
        self._parser.ProcessingInstructionHandler = self._instruction

    def read(self) -> list[_Speak]:
        """Raises InvalidRequest for anything but well-formed speak elements side by side."""
        try:
            self._parser.Parse(self._source, True)
        except expat.ExpatError as error:
            if DECLARATION.search(self._source, self._parser.ErrorByteIndex - 2, self._parser.ErrorByteIndex + 9):
                self._instruction()
            raise self._refusal("有语法错误，请检查标签是否闭合，文字中的 & 和 < 是否写成 &amp; 和 &lt;") from error
        if not self._speaks:
            raise InvalidRequest("SSML 中没有 <speak> 元素")
        return self._speaks

    def _refusal(self, reason: str) -> InvalidRequest:
        line, column = self._parser.CurrentLineNumber - 1, self._parser.CurrentColumnNumber + 1
        return InvalidRequest(f"SSML 第 {line} 行第 {column} 列{reason}")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if self._depth == IN_WRAPPER:
            if name != "speak":
                raise self._refusal(f"的 <{name[:64]}> 必须放在 <speak> 里")
            line = self._parser.CurrentLineNumber - 1
            self._speaks.append(_Speak(self._parser.CurrentByteIndex, line, "bgm" in attributes))
        elif self._depth >= IN_SPEAK:
            if name == "speak":
                raise self._refusal("的 <speak> 不能嵌套，请改为并列")
            if self._depth > MAX_SSML_DEPTH:
                raise self._refusal(f"的标签嵌套过深，最多 {MAX_SSML_DEPTH} 层")
            self._add_child(AS_PAUSE if name == "break" else AS_SOUND)
        self._depth += 1

    def _end(self, name: str) -> None:
        self._depth -= 1
        if self._depth == IN_WRAPPER:
            speak, here = self._speaks[-1], self._parser.CurrentByteIndex
            is_empty_tag = self._source.startswith(WRAPPER_END, here) or not self._source.startswith(b"</", here)
            speak.inner_end, speak.end = here, here if is_empty_tag else self._source.index(b">", here) + 1

    def _text(self, data: str) -> None:
        if self._depth == IN_WRAPPER:
            if data.strip():
                raise self._refusal("的文字必须放在 <speak> 里")
        elif self._depth > IN_SPEAK or self._in_cdata:
            self._hear(data)
        else:
            self._add_child(data if self._source.startswith(b"&", self._parser.CurrentByteIndex) else AS_TEXT)

    def _switch_cdata(self) -> None:
        self._in_cdata = not self._in_cdata
        if self._in_cdata:
            self._add_child(AS_SOUND)

    def _instruction(self, *_: str) -> None:
        raise self._refusal("有 DOCTYPE、实体声明、XML 声明或处理指令，请删除")

    def _add_child(self, cut_as: str) -> None:
        if self._depth == IN_SPEAK:
            children = self._speaks[-1].children
            if cut_as != AS_TEXT or not children or children[-1][1] != AS_TEXT:
                children.append((self._parser.CurrentByteIndex, cut_as))

    def _hear(self, text: str) -> None:
        begin, cut_as = self._speaks[-1].children[-1]
        if cut_as != AS_WORD and is_speakable(text):
            self._speaks[-1].children[-1] = begin, AS_WORD


def _split_speak(source: bytes, speak: _Speak) -> list[str]:
    """The parts of a speak element, each in its tags; the element itself if it is short."""
    whole = source[speak.start : speak.end].decode()
    if _is_short(count_characters(whole, ssml=True), len(whole)):
        return [whole]
    if speak.has_music:
        raise InvalidRequest(f"SSML 第 {speak.line} 行的 <speak> 有背景音乐，过长而不能拆分，请去掉 bgm 或自行分段")
    children = [*speak.children, (speak.inner_end, AS_NOTHING)]
    opening, inner, closing = (
        source[begin:end].decode() for begin, end in pairwise((speak.start, children[0][0], speak.inner_end, speak.end))
    )
    room = MAX_SEGMENT_CHARACTERS - count_characters(opening + closing, ssml=True)
    length_room = MAX_SSML_SEGMENT_CHARS - len(opening + closing)
    line = speak.line + opening.count("\n")
    text, counts, lengths = list[str](), list[int](), list[int]()
    for (begin, cut_as), (end, _) in pairwise(children):
        written = source[begin:end].decode()
        text.append(cut_as or written)
        counts += [count_characters(written, ssml=True)] if cut_as else counts_of(written)
        lengths += [len(written)] if cut_as else [1] * len(written)
        if counts[-1] > room or lengths[-1] > length_room:
            break
        line += written.count("\n")
    else:
        if text:
            offsets = list(accumulate(lengths, initial=0))
            cuts = [offsets[cut] for cut in Cutter("".join(text), (counts, room), (lengths, length_room)).cut()]
            return [f"{opening}{inner[begin:end]}{closing}" for begin, end in pairwise(cuts)]
    raise InvalidRequest(
        f"SSML 第 {line} 行的元素过长：一个元素最多 {MAX_SEGMENT_CHARACTERS} 个字符（一个汉字算 2 个），"
        f"连同标签最多 {MAX_SSML_SEGMENT_CHARS} 个，请拆成几个元素"
    )


def _is_short(characters: int, length: int) -> bool:
    return characters <= MAX_SEGMENT_CHARACTERS and length <= MAX_SSML_SEGMENT_CHARS

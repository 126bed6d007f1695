"""Samples that come in pieces of any size, and texts that may be SSML: all of it comes out, once."""

import io
import wave

from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.joining import Joiner, samples_to_ms
from app.ssml import MAX_SSML_SEGMENT_CHARS, split_ssml
from tests.sound import decode

RATES = st.sampled_from([8000, 16000, 22050, 24000, 44100, 48000])
PIECES = st.lists(st.binary(max_size=50), max_size=12)
MARKUP = st.sampled_from([
    "<speak>", "</speak>", "<speak/>", "<break/>", "<", ">", "&", "&amp;", "&#0;", "&#xD800;", "]]>", "<!--", "-->",
    "<![CDATA[", "<?x?>", "<!DOCTYPE a>", "\0", "\ud800", "👨\u200d👩\u200d👧", "e\u0301", "好。", " ", "好" * 1001,
    "<a b='c'>", "</a>",
])  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=60)
@given(PIECES, RATES)
def test_a_file_has_exactly_the_samples_that_came(pieces: list[bytes], rate: int) -> None:
    sent = b"".join(pieces)
    whole = sent[: len(sent) // 2 * 2]
    for format in ("pcm", "wav"):
        target = io.BytesIO()
        joiner = Joiner(target, format, rate, 32)
        for piece in pieces:
            joiner.add(piece)
        assert joiner.finish() == samples_to_ms(len(whole) // 2, rate)
        content = target.getvalue()
        if format == "wav":
            with wave.open(io.BytesIO(content)) as file:
                assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (rate, 1, 2)
                content = file.readframes(file.getnframes())
        assert content == whole


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 5000), max_size=5), st.sampled_from(["mp3", "opus"]), RATES)
def test_an_encoded_file_is_as_long_as_what_came(sizes: list[int], format: str, rate: int) -> None:
    target = io.BytesIO()
    joiner = Joiner(target, "mp3" if format == "mp3" else "opus", rate, 32)
    for size in sizes:
        joiner.add(bytes(size))
    samples = sum(sizes) // 2
    assert joiner.finish() == samples_to_ms(samples, rate)
    if samples:
        heard, heard_rate = decode(target.getvalue(), format, rate)
        assert abs(len(heard) / heard_rate - samples / rate) <= 2 / rate


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(MARKUP | st.text(max_size=8), max_size=12).map("".join))
def test_any_text_is_cut_as_ssml_or_refused(text: str) -> None:
    for tried in (text, f"<speak>{text}</speak>"):
        try:
            segments = split_ssml(tried)
        except InvalidRequest:
            continue
        assert segments == [tried] or all(0 < len(segment) <= MAX_SSML_SEGMENT_CHARS for segment in segments)
        assert all("<speak" in segment for segment in segments)

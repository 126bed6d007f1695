from __future__ import annotations

from array import array
from collections.abc import Iterator

import oss2
import pytest

from app.sandbox import SandboxOptions, voice
from app.sandbox.fundamental import height_of, height_of_samples
from app.sandbox.voice import SPEECH_RATE, Manner, ToneSpeaker

from .conftest import RunningSandbox, running
from .dialogue import decode, height
from .samples import as_wav, encoded, hum, stereo
from .services import ANYBODY, ENROLLMENT, FLASH, RESOLVE, Json, Services, calling, data_uri, error, output, speak

CLONE: Json = {"target_model": "cosyvoice-v3-flash", "prefix": "mine"}
TEXT = "今天天气怎么样？我们去公园散步吧。"

SHORT = (400, "Audio.AudioShortError", "valid audio too short!")
SILENT = (430, "Audio.AudioSilentError", "Silent file unsupported.")
BROKEN = (430, "Audio.DecoderError", "Decoder audio file failed.")
FORMAT = (400, "BadRequest.UnsupportedFileFormat", "File format unsupported.")
RATE = (430, "Audio.AudioRateError", "File sample rate unsupported")
LARGE = (430, "Audio.FileSizeExceed", "File too large")
LONG = (400, "Audio.DurationLimitError", "Audio duration exceeds 60s.")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningSandbox]:
    with running(SandboxOptions(voice_seconds=0)) as server:
        yield server


@pytest.fixture
def services(server: RunningSandbox) -> Iterator[Services]:
    with calling(server) as services:
        yield services


def refusal(services: Services, sample: bytes) -> tuple[int, str, str]:
    url = services.upload(sample, ENROLLMENT)
    return error(services.customize("create_voice", RESOLVE, url=url, **CLONE))


@pytest.mark.parametrize(
    ("sample", "suffix"),
    [
        (as_wav(hum()), "wav"),
        (as_wav(hum(seconds=5.0)), "wav"),
        (as_wav(hum(seconds=60.0)), "wav"),
        (as_wav(hum(rate=48000), rate=48000), "wav"),
        (as_wav(stereo(hum(), hum(loud=0)), channels=2), "wav"),
        (encoded(hum(), "mp3", "libmp3lame"), "mp3"),
        (encoded(hum(), "ipod", "aac"), "m4a"),
    ],
)
def test_good_samples_are_taken_and_can_be_heard_again(services: Services, sample: bytes, suffix: str) -> None:
    voice_id = services.enroll(services.upload(sample, ENROLLMENT, "no suffix"))
    link = services.voice(voice_id)["resource_link"]
    assert link.partition("?")[0].endswith(f".{suffix}")
    assert ANYBODY.get(link).content == sample
    noted = services.requests()[-2]
    assert (noted["audio_source"], noted["audio_bytes"]) == ("oss", len(sample))


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (as_wav(hum(seconds=4.9)), SHORT),
        (as_wav(hum(seconds=2.0) + hum(seconds=8.0, loud=0)), SHORT),
        (as_wav(hum(loud=0)), SILENT),
        (as_wav(stereo(hum(loud=0), hum()), channels=2), SILENT),
        (as_wav(hum(seconds=60.1)), LONG),
        (as_wav(hum(rate=8000), rate=8000), RATE),
        (as_wav(hum(seconds=60.0, rate=96000), rate=96000), LARGE),
        (encoded(hum(), "flac", "flac"), FORMAT),
        (encoded(hum(), "wav", "pcm_s24le"), FORMAT),
        (encoded(hum(), "ogg", "libopus"), FORMAT),
        (b"", FORMAT),
        (b"<html>404</html>" * 100, FORMAT),
        (b"RIFF\0\0\0\0WAVE" + b"\0" * 100, BROKEN),
        (b"ID3" + b"\0" * 1000, BROKEN),
    ],
)
def test_bad_samples_are_refused(services: Services, sample: bytes, expected: tuple[int, str, str]) -> None:
    assert refusal(services, sample) == expected
    assert services.voices() == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("short", SHORT),
        ("silent", SILENT),
        ("long", LONG),
        ("broken", BROKEN),
    ],
)
def test_names_of_other_hosts_tell_what_is_behind_them(
    services: Services, name: str, expected: tuple[int, str, str]
) -> None:
    url = f"https://media.example.com/{name}.m4a"
    assert error(services.customize("create_voice", url=url, **CLONE)) == expected


@pytest.mark.parametrize("name", ["missing", "forbidden", "unreachable"])
def test_what_is_not_there_is_not_downloaded(services: Services, name: str) -> None:
    url = f"https://media.example.com/{name}.wav"
    failed = (400, "BadRequest.InputDownloadFailed", f"Failed to download the input file: {url}.")
    assert error(services.customize("create_voice", url=url, **CLONE)) == failed


def test_temporary_files_are_read_for_their_model_with_the_header(services: Services) -> None:
    url = services.upload(as_wav(hum()), ENROLLMENT)
    assert error(services.customize("create_voice", url=url, **CLONE))[:2] == (400, "invalid_parameter_error")
    other = services.upload(as_wav(hum()), FLASH)
    refused = services.customize("create_voice", RESOLVE, url=other, **CLONE)
    assert error(refused)[:2] == (400, "BadRequest.InputDownloadFailed")
    assert output(services.customize("create_voice", RESOLVE, url=url, **CLONE))["voice_id"]


def test_objects_are_read_as_anybody_could(services: Services) -> None:
    sample = as_wav(hum())
    auth = oss2.AuthV4("sandbox-id", "sandbox-secret")
    bucket = oss2.Bucket(auth, services.server.http_url, "media-private", region="cn-hangzhou")
    bucket.put_object("voices/a.wav", sample)
    signed = bucket.sign_url("GET", "voices/a.wav", 60, slash_safe=True)
    voice_id = services.enroll(signed)
    assert ANYBODY.get(services.voice(voice_id)["resource_link"]).content == sample
    for url in (signed.partition("?")[0], signed.replace("a.wav", "b.wav")):
        refused = services.customize("create_voice", url=url, **CLONE)
        assert error(refused)[:2] == (400, "BadRequest.InputDownloadFailed")


def test_a_failed_update_changes_nothing(services: Services) -> None:
    sample = as_wav(hum())
    voice_id = services.enroll(services.upload(sample, ENROLLMENT))
    silent = services.upload(as_wav(hum(loud=0)), ENROLLMENT)
    assert error(services.customize("update_voice", RESOLVE, voice_id=voice_id, url=silent)) == SILENT
    told = services.voice(voice_id)
    assert told["status"] == "OK"
    assert ANYBODY.get(told["resource_link"]).content == sample


@pytest.fixture(params=["the best speaker", "a tone"])
def mouth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sandbox speaks with."""
    if request.param == "a tone":
        monkeypatch.setattr(voice, "_loaded", [ToneSpeaker()])
    voice.speak.cache_clear()


@pytest.mark.usefixtures("mouth")
async def test_clones_speak_as_high_as_their_samples(services: Services) -> None:
    async def heard(voice_id: str) -> float:
        audio = await speak(services.server, TEXT, key=services.key, voice=voice_id)
        return height(decode(audio, "pcm", SPEECH_RATE)[0])

    low = services.enroll(services.upload(as_wav(hum(120)), ENROLLMENT))
    high = services.enroll(services.upload(encoded(hum(300), "ipod", "aac"), ENROLLMENT))
    assert await heard(low) == pytest.approx(120, rel=0.15)
    assert await heard(high) == pytest.approx(300, rel=0.15)
    updated = services.upload(as_wav(hum(200)), ENROLLMENT)
    output(services.customize("update_voice", RESOLVE, voice_id=low, url=updated))
    assert await heard(low) == pytest.approx(200, rel=0.15)


async def test_what_a_clone_says_is_recognised_and_is_its_own(services: Services) -> None:
    first, second = (services.enroll("https://media.example.com/a.wav") for _ in range(2))
    spoken = [await speak(services.server, TEXT, key=services.key, voice=each) for each in (first, second)]
    spoken.append(await speak(services.server, TEXT, key=services.key))
    assert len({*spoken}) == 3
    for audio in spoken:
        uri = data_uri(as_wav(array("h", audio), rate=SPEECH_RATE))
        content = services.recognise(uri).json()["output"]["choices"][0]["message"]["content"]
        assert content == [{"text": TEXT}]


@pytest.mark.parametrize("hertz", [80, 120, 200, 320, 440])
def test_height_is_measured(hertz: int) -> None:
    assert height_of(as_wav(hum(hertz))) == pytest.approx(hertz, rel=0.05)
    assert height_of(encoded(hum(hertz), "mp3", "libmp3lame")) == pytest.approx(hertz, rel=0.05)
    assert height_of_samples(hum(hertz, rate=SPEECH_RATE).tobytes(), SPEECH_RATE) == pytest.approx(hertz, rel=0.05)


def test_silence_has_no_height() -> None:
    assert height_of(as_wav(hum(loud=0))) is None
    assert height_of_samples(b"", SPEECH_RATE) is None


@pytest.mark.parametrize("hertz", [100.0, 180.0, 300.0])
def test_every_speaker_speaks_at_a_given_height(hertz: float) -> None:
    speakers = [ToneSpeaker(), voice.load_speaker()]
    for speaker in speakers:
        gender = "male" if hertz < 165 else "female"
        manner = Manner("own", gender, ("zh", "en"), None, 1.0, 1.0, 50, hertz)
        assert height_of_samples(speaker.speak(TEXT, manner), SPEECH_RATE) == pytest.approx(hertz, rel=0.12)
        raised = Manner("own", gender, ("zh", "en"), None, 1.0, 1.4, 50, hertz)
        assert height_of_samples(speaker.speak(TEXT, raised), SPEECH_RATE) == pytest.approx(1.4 * hertz, rel=0.12)

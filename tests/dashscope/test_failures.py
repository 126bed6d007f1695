"""What each error of the provider means to a client (DESIGN §5, PROTOCOL §11)."""

import pytest

from app.dashscope.failures import explain, may_retry
from app.errors import (
    Abandoned,
    AppError,
    AudioTooLong,
    ConnectionLost,
    HandshakeTimeout,
    InvalidApiKey,
    InvalidAudio,
    InvalidModel,
    InvalidVoice,
    Throttled,
    UpstreamError,
    UpstreamTimeout,
    VoiceLimitExceeded,
    VoiceNotFound,
)

MEANINGS: list[tuple[type[AppError], str, str]] = [
    (InvalidApiKey, "InvalidApiKey", "Invalid API-key provided."),
    (InvalidApiKey, "invalid_api_key", "Incorrect API key provided."),
    (InvalidModel, "ModelNotFound", "Model can not be found."),
    (InvalidModel, "model_not_found", "Model can not be found."),
    (InvalidModel, "InvalidParameter", "Model not exist."),
    (InvalidModel, "Model.AccessDenied", "Model access denied."),
    (InvalidModel, "AccessDenied.Unpurchased", "Access to model denied."),
    (InvalidVoice, "InvalidParameter", "[tts:]Engine return error code: 418"),
    (InvalidVoice, "InvalidParameter", "Engine return error code: 418"),
    (InvalidVoice, "InvalidParameter", "Request voice is invalid!"),
    (InvalidVoice, "InternalError", "Remote cancelled grpc stream."),
    (InvalidAudio, "Audio.AudioShortError", "Audio too short."),
    (InvalidAudio, "Audio.AudioSilentError", ""),
    (InvalidAudio, "Audio.DecoderError", ""),
    (InvalidAudio, "Audio.PreprocessError", ""),
    (InvalidAudio, "Audio.AudioRateError", ""),
    (InvalidAudio, "Audio.FileSizeExceed", ""),
    (InvalidAudio, "BadRequest.UnsupportedFileFormat", "File format unsupported."),
    (InvalidAudio, "BadRequest.InputDownloadFailed", "Failed to download the input file"),
    (InvalidAudio, "FILE_DOWNLOAD_FAILED", ""),
    (InvalidAudio, "FILE_403_FORBIDDEN", ""),
    (InvalidAudio, "DECODE_ERROR", ""),
    (AudioTooLong, "InvalidFile.AudioLengthError", "Audio length must be between 1s and 300s."),
    (AudioTooLong, "AUDIO_DURATION_TOO_LONG", ""),
    (AudioTooLong, "Audio.DurationLimitError", ""),
    (VoiceLimitExceeded, "Throttling.AllocationQuota", "您当前的配额为1000"),
    (VoiceLimitExceeded, "Throttling.AllocationQuota", "Maximum voice storage limit exceeded, please delete some."),
    (VoiceLimitExceeded, "Throttling.AllocationQuota", "Maximum voice-clone voice limit exceeded."),
    (VoiceNotFound, "BadRequest.ResourceNotExist", "voice not found"),
    (VoiceNotFound, "BadRequest.VoiceNotFound", ""),
    (VoiceNotFound, "VoiceNotFound", ""),
    (Throttled, "Throttling", "Requests throttling triggered."),
    (Throttled, "Throttling", "Too many requests in route."),
    (Throttled, "Throttling.RateQuota", "Requests rate limit exceeded, please try again later."),
    (Throttled, "Throttling.BurstRate", "Request rate increased too quickly"),
    (Throttled, "Throttling.AllocationQuota", "Allocated quota exceeded, please increase your quota limit."),
    (Throttled, "limit_requests", "You have exceeded your request limit."),
    (Throttled, "limit_burst_rate", ""),
    (Throttled, "insufficient_quota", "Allocated quota exceeded"),
    (Throttled, "CLIENT_ERROR", "Requests rate limit exceeded, please try again later."),
    (UpstreamError, "Throttling.AllocationQuota", "Free allocated quota exceeded."),
    (UpstreamError, "AllocationQuota.FreeTierOnly", "The free tier of the model has been exhausted."),
    (UpstreamError, "Arrearage", "Access denied, please make sure your account is in good standing."),
    (UpstreamError, "PrepaidBillOverdue", ""),
    (UpstreamError, "PostpaidBillOverdue", ""),
    (UpstreamError, "DataInspectionFailed", "Input data may contain inappropriate content."),
    (UpstreamError, "data_inspection_failed", ""),
    (UpstreamError, "InvalidParameter", "[tts:]Engine return error code: 428"),
    (UpstreamError, "InvalidParameter", "request timeout after 23 seconds."),
    (UpstreamError, "InvalidParameter", "task can not be null"),
    (UpstreamError, "Workspace.AccessDenied", ""),
    (UpstreamError, "InternalError", "An internal error has occured, please try again later"),
    (UpstreamError, "internal_error", ""),
    (UpstreamError, "ModelServingError", ""),
    (UpstreamError, "ClientDisconnect", "Client disconnected before task finished!"),
    (UpstreamError, "SomethingNew", "Something that nobody has seen yet"),
    (UpstreamError, "", ""),
]


@pytest.mark.parametrize(("meaning", "code", "message"), MEANINGS)
def test_an_error_of_the_provider_has_one_meaning(meaning: type[AppError], code: str, message: str) -> None:
    assert type(explain(code, message)) is meaning


@pytest.mark.parametrize(
    ("code", "message"), [(code, message) for kind, code, message in MEANINGS if kind is Throttled]
)
def test_throttling_says_when_to_come_back(code: str, message: str) -> None:
    assert explain(code, message).retry_after_seconds


@pytest.mark.parametrize(
    ("code", "message"), [(code, message) for kind, code, message in MEANINGS if kind is UpstreamError and code]
)
def test_an_error_that_has_no_name_of_ours_carries_the_code_of_the_provider(code: str, message: str) -> None:
    assert code in explain(code, message).message


def test_an_unknown_error_is_told_in_the_words_of_the_provider() -> None:
    assert "the moon is full" in explain("Odd", "the moon\n is\tfull").message


def test_long_messages_are_cut() -> None:
    assert len(explain("Odd", "a" * 10_000).message) < 300


@pytest.mark.parametrize("code", ["Odd", "Audio.DecoderError", "FILE_DOWNLOAD_FAILED"])
@pytest.mark.parametrize(
    "message",
    [
        "Incorrect API key provided: sk-test-0123456789abcdef.",
        "Incorrect API key provided: SK-TEST-0123456789ABCDEF.",
        "key=sk-test-0123456789abcdef&x=1",
        '{"Authorization":"Bearer sk-test-0123456789abcdef"}',
        "authorization: bearer test-0123456789abcdef",
        "temporary key st-test-0123456789abcdef has expired",
        "key sk-****cdef is odd",
        "密钥sk-test-0123456789abcdef无效",
        "api_key_sk-test-0123456789abcdef",
        "a" * 190 + " sk-test-0123456789abcdef",
    ],
)
def test_nothing_that_looks_like_a_key_comes_through(code: str, message: str) -> None:
    shown = explain(code, message).message.casefold()
    assert "cdef" not in shown
    assert "test-0" not in shown
    assert "sk-test" not in shown


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionLost(), True),
        (HandshakeTimeout(), True),
        (Throttled(), True),
        (UpstreamTimeout(), False),
        (UpstreamError(), False),
        (InvalidApiKey(), False),
        (InvalidVoice(), False),
        (Abandoned(), False),
    ],
)
def test_only_what_was_surely_not_taken_on_may_be_asked_again(error: AppError, again: bool) -> None:
    assert may_retry(error, accepted=False) is again
    assert may_retry(error, accepted=True) is False

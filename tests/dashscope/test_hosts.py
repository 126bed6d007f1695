"""Which addresses of the provider's may be called (PROTOCOL §5.1, §6)."""

from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.dashscope import Credential
from app.dashscope.hosts import require_provider_url
from app.errors import UpstreamError

BUCKET = "dashscope-result-bj.oss-cn-beijing.aliyuncs.com"
SIGNED = "/prod/paraformer-v2/20250925/01%3A37/b0-1.json?Expires=1758821858&OSSAccessKeyId=LTAI&Signature=a%2Bb%2Fc%3D"
OFFICIAL = Credential("sk-test-1", "ws://unused.test", "https://dashscope.aliyuncs.com/api/v1")
LOCAL = Credential("sk-test-1", "ws://unused.test", "http://127.0.0.1:8100/api/v1")


@pytest.mark.parametrize(
    ("url", "called"),
    [
        (f"https://{BUCKET}{SIGNED}", f"https://{BUCKET}{SIGNED}"),
        (f"http://{BUCKET}{SIGNED}", f"https://{BUCKET}{SIGNED}"),
        (f"HTTP://{BUCKET.upper()}/A.json", f"https://{BUCKET}/A.json"),
        (f"http://{BUCKET}:80/a", f"https://{BUCKET}/a"),
        (f"https://{BUCKET}:443/a", f"https://{BUCKET}/a"),
        (f"https://{BUCKET}", f"https://{BUCKET}"),
        (f"https://{BUCKET}?a=b", f"https://{BUCKET}?a=b"),
        (
            "http://dashscope-result-sh.oss-cn-shanghai.aliyuncs.com/a",
            "https://dashscope-result-sh.oss-cn-shanghai.aliyuncs.com/a",
        ),
        (
            "https://dashscope-file-x.oss-ap-southeast-1.aliyuncs.com",
            "https://dashscope-file-x.oss-ap-southeast-1.aliyuncs.com",
        ),
        ("https://b.oss-accelerate.aliyuncs.com/a", "https://b.oss-accelerate.aliyuncs.com/a"),
        ("https://dashscope.aliyuncs.com/files/a?b=c", "https://dashscope.aliyuncs.com/files/a?b=c"),
    ],
)
def test_an_address_of_the_provider_is_called_over_tls(url: str, called: str) -> None:
    assert require_provider_url(url, OFFICIAL) == called


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8100/results/a.json?x=%2B",
        "http://localhost:8100/results/a.json",
        "http://LOCALHOST:8100/a",
        "http://[::1]:8100/a",
        "http://127.0.0.1:8100",
    ],
)
def test_a_local_stand_in_may_name_itself(url: str) -> None:
    assert require_provider_url(url, LOCAL) == url


def test_buckets_are_called_for_a_local_stand_in_too() -> None:
    assert require_provider_url(f"http://{BUCKET}/a", LOCAL) == f"https://{BUCKET}/a"


STRANGE: list[object] = [
    "",
    " ",
    None,
    7,
    True,
    {},
    ["https://dashscope.aliyuncs.com/"],
    b"https://dashscope.aliyuncs.com/",
    "a.json",
    "/a.json",
    f"//{BUCKET}/a",
    BUCKET,
    "https:",
    "https://",
    "https:///a",
    f"https:/{BUCKET}/a",
    f"ftp://{BUCKET}/a",
    f"file://{BUCKET}/a",
    f"oss://{BUCKET}/a",
    "file:///etc/passwd",
    "javascript:alert(1)",
    # another host
    "https://example.com/a",
    f"https://example.com/{BUCKET}",
    f"https://example.com?{BUCKET}",
    f"https://example.com#{BUCKET}",
    f"https://example.com\\.{BUCKET}/a",
    f"https://{BUCKET}.example.com/a",
    f"https://{BUCKET}example.com/a",
    f"https://{BUCKET}./a",
    f"https://a.b.{BUCKET}/a",
    f"https://.{BUCKET.partition('.')[2]}/a",
    "https://oss-cn-beijing.aliyuncs.com/a",
    "https://bucket.oss-cn-beijing.aliyuncs.com.cn/a",
    "https://bucket.oss-cn-beijing-aliyuncs.com/a",
    "https://bucket.oss-cn-beijingaliyuncs.com/a",
    "https://bucket.oss-cn-beijing.evil.aliyuncs.com/a",
    "https://bucket.ecs-cn-beijing.aliyuncs.com/a",
    "https://bucket_x.oss-cn-beijing.aliyuncs.com/a",
    "https://bücket.oss-cn-beijing.aliyuncs.com/a",
    "https://bucket.oss-cn-beijing.aliyuncs。com/a",
    "https://bucket%2eoss-cn-beijing.aliyuncs.com/a",
    "https://dashscope-intl.aliyuncs.com/a",
    "https://evil-dashscope.aliyuncs.com/a",
    "https://dashscope.aliyuncs.com.evil.com/a",
    # a way into private networks
    "https://bucket.oss-cn-beijing-internal.aliyuncs.com/a",
    "https://bucket.oss-internal.aliyuncs.com/a",
    "https://bucket.oss-cn-beijing-INTERNAL.aliyuncs.com/a",
    "https://bucket.vpc100-oss-cn-beijing.aliyuncs.com/a",
    "http://127.0.0.1/a",
    "http://localhost/a",
    "http://[::1]/a",
    "http://169.254.169.254/latest/meta-data",
    "http://100.100.100.200/latest/meta-data",
    "http://2130706433/a",
    "http://0/a",
    # a user, an odd port, another scheme
    f"https://user@{BUCKET}/a",
    f"https://user:word@{BUCKET}/a",
    f"https://@{BUCKET}/a",
    f"https://:@{BUCKET}/a",
    f"https://{BUCKET}@example.com/a",
    f"https://{BUCKET}:@example.com/a",
    f"https://{BUCKET}\\@example.com/a",
    f"https://{BUCKET}:8080/a",
    f"https://{BUCKET}:22/a",
    f"https://{BUCKET}:0/a",
    f"https://{BUCKET}:-1/a",
    f"https://{BUCKET}:x/a",
    f"https://{BUCKET}:99999/a",
    "http://dashscope.aliyuncs.com/a",
    "https://dashscope.aliyuncs.com:8443/a",
    "https://user@dashscope.aliyuncs.com/a",
    "https://[::1",
    "https://[example]/a",
]


@pytest.mark.parametrize("url", STRANGE, ids=repr)
def test_any_other_address_is_refused(url: object) -> None:
    with pytest.raises(UpstreamError) as refused:
        require_provider_url(url, OFFICIAL)
    assert type(refused.value) is UpstreamError


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8101/a",
        "http://127.0.0.1/a",
        "https://127.0.0.1:8100/a",
        "http://127.0.0.2:8100/a",
        "http://0.0.0.0:8100/a",
        "http://127.0.0.1.example.com:8100/a",
        "http://user@127.0.0.1:8100/a",
        "http://example.com:8100/a",
        "https://dashscope.aliyuncs.com/a",
    ],
)
def test_a_local_stand_in_opens_no_other_door(url: str) -> None:
    with pytest.raises(UpstreamError):
        require_provider_url(url, LOCAL)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8101/a", "http://localhost/a", "http://127.0.0.1:8100/a"])
def test_the_host_may_be_enough(url: str) -> None:
    assert require_provider_url(url, LOCAL, any_port=True) == url


@pytest.mark.parametrize(
    "url",
    [
        f"https://{BUCKET}:8101/a",
        "https://127.0.0.1:8101/a",
        "http://127.0.0.2:8101/a",
        "http://example.com:8101/a",
        "http://user@127.0.0.1:8101/a",
        "http://127.0.0.1:99999/a",
        "http://dashscope.aliyuncs.com/a",
    ],
)
def test_any_port_is_not_any_host(url: str) -> None:
    with pytest.raises(UpstreamError):
        require_provider_url(url, LOCAL, any_port=True)


def test_a_refused_address_is_not_repeated_to_the_user() -> None:
    with pytest.raises(UpstreamError) as refused:
        require_provider_url("https://user:word@example.com/?Signature=s", OFFICIAL)
    assert "example" not in refused.value.message
    assert "word" not in refused.value.message


hosts = st.sampled_from(
    [BUCKET, "dashscope.aliyuncs.com", "example.com", "127.0.0.1", "[::1]", "x@", ":80", "\\", "#", "。"]
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.text()
    | st.from_regex(r"https?://[^/]{0,40}(/.{0,20})?", fullmatch=True)
    | st.lists(hosts | st.text(max_size=3), max_size=5).map(lambda parts: "https://" + "".join(parts) + "/a")
)
def test_only_hosts_of_the_provider_come_through(url: str) -> None:
    for credential in (OFFICIAL, replace(OFFICIAL, http_url="https://llm-1.cn-beijing.maas.aliyuncs.com/api/v1")):
        try:
            parts = urlsplit(require_provider_url(url, credential))
        except UpstreamError:
            continue
        assert parts.scheme == "https"
        assert parts.netloc.lower() in {BUCKET, urlsplit(credential.http_url).netloc}

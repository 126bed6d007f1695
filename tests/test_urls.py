"""Addresses in every spelling that reaches more than the public internet, and those that must pass unchanged."""

import ipaddress
import re
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.urls import MAX_URL_CHARACTERS, require_public_url

SIGNED = (
    "https://bucket.oss-cn-beijing.aliyuncs.com/a%2Fb/%E5%BD%95%E9%9F%B3+1.mp3?x-oss-signature-version=OSS4-HMAC-SHA256"
    "&x-oss-credential=LTAI%2F20251230%2Fcn-beijing%2Foss%2Faliyun_v4_request&x-oss-expires=3600&Signature=a%2Bb/c+d%3D=="
)

UNCHANGED = [
    SIGNED,
    "http://example.com",
    "https://example.com/",
    "https://example.com?list=1",
    "HTTPS://Example.COM/A.MP3",
    "https://example.com:8443/a.mp3",
    "http://example.com:80/a",
    "https://example.com./a.mp3",
    "https://my_bucket.example.com/a",
    "https://xn--fiqs8s.xn--fiqs8s/a",
    "https://3.example.com/a",
    "https://localhost.example.com/a",
    "https://internal-tools.example.com/a",
    "https://my.localized.org/a",
    "https://8.8.8.8/a.mp3",
    "http://1.1.1.1:8080/a",
    "https://[2001:4860:4860::8888]/a",
    "https://[2400:3200::1]:8443/a?b",
    "https://example.com/a@b:c/d;e,f?g=[1]&h={2}&u=http://127.0.0.1/",
    "https://example.com/%zz%",
    "https://example.com//a/../b",
]

ENCODED = {
    "https://example.com/录音 1.mp3": "https://example.com/%E5%BD%95%E9%9F%B3%201.mp3",
    "https://example.com/a?名=值 x&y=%2F": "https://example.com/a?%E5%90%8D=%E5%80%BC%20x&y=%2F",
    "https://例子.中国/a": "https://xn--fsqu00a.xn--fiqs8s/a",
    "https://Bücher.example.com:81/ü": "https://xn--bcher-kva.example.com:81/%C3%BC",
    "https://ｅｘａｍｐｌｅ．com/a": "https://example.com/a",
    "https://例子。中国/a": "https://xn--fsqu00a.xn--fiqs8s/a",
    "https://ex\u200dample.com/a": "https://example.com/a",
    "https://８.８.８.８/a": "https://8.8.8.8/a",
    "https://example.com/\u3000\u200b😀": "https://example.com/%E3%80%80%E2%80%8B%F0%9F%98%80",
}

NOT_PUBLIC = [
    # loopback, private, link-local, shared, unspecified, reserved, multicast, documentation, benchmarks
    "127.0.0.1",
    "127.8.9.1",
    "127.0.0.1.",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "100.100.100.200",
    "0.0.0.0",  # noqa: S104
    "0.1.2.3",
    "240.0.0.1",
    "255.255.255.255",
    "224.0.0.1",
    "239.255.255.250",
    "192.0.2.1",
    "198.51.100.7",
    "203.0.113.7",
    "198.18.0.1",
    # the same in full-width or circled characters
    "１２７.０.０.１",
    "127。0。0。1",
    "１２７．０．０．１",
    "①②⑦.⓪.⓪.①",
    # IPv6, and IPv4 within it
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[fe80::1]",
    "[fe80::1%25eth0]",
    "[fe80::1%eth0]",
    "[2001:4860:4860::8888%25eth0]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[FEC0::1]",
    "[ff02::1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:8.8.8.8]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b:1::a00:1]",
    "[2002:7f00:1::]",
    "[2001:0:53aa:64c:0:0:80ff:fffe]",
    "[2001:db8::1]",
    "[3fff::1]",
    "[100::1]",
    # names
    "localhost",
    "LOCALHOST",
    "localhost.",
    "ｌｏｃａｌｈｏｓｔ",
    "a.localhost",
    "printer.local",
    "nas.lan",
    "nas.home.arpa",
    "nas.home",
    "db.internal",
    "metadata.google.internal",
    "metadata.tencentyun.com",
    "wiki.corp",
    "x.localdomain",
    "metadata",
    "db",
    "backend.",
]

NO_HOST = [
    # addresses that are not four decimal numbers
    "2130706433",
    "0x7f000001",
    "0x7F.0.0.1",
    "0x",
    "a.0x",
    "017700000001",
    "0177.0.0.1",
    "0010.0.0.1",
    "127.1",
    "127.0.1",
    "127.0.0.1..",
    "1.2.3.4.5",
    "256.1.1.1",
    "8.8.8.08",
    "134744072",
    "example.com.1",
    "１２７.１",
    "127%2e0.0.1",
    "%31%32%37.0.0.1",
    "[::1g]",
    "[127.0.0.1]",
    "[]",
    "[:::1]",
    "[1:2:3]",
    # names that are none
    "ex ample.com",
    "-a.example.com",
    "a-.example.com",
    ".example.com",
    "a..example.com",
    "example.com..",
    ".",
    "exa%6dple.com",
    "exa$mple.com",
    "a,b.com",
    "a／b.com",
    "example.com＠evil.com",
    "example.com：80",
    "℀.com",
    "a" * 64 + ".com",
    "a." * 130 + "com",
    "例" * 70 + ".com",
    "例." * 130 + "com",
]

MALFORMED = [
    "",
    "example.com/a.mp3",
    "//example.com/a",
    "/a.mp3",
    "ftp://example.com/a",
    "file:///etc/passwd",
    "oss://bucket/a",
    "data:audio/mpeg;base64,AAAA",
    "javascript:alert(1)",
    "gopher://example.com",
    "httpſ://example.com/",
    "ｈttp://example.com/",
    "http:example.com",
    "http:/example.com",
    "http:///example.com",
    "http://",
    "https://?a",
    "https://:80/",
    "https://example.com:/a",
    "https://example.com:80a/",
    "https://example.com:-1/",
    "https://example.com:８０/",
    "https://example.com:80:80/",
    "https://[2400:3200::1/a",
    "https://[2400:3200::1]x/a",
    "https://2400:3200::1/a",
]


def refusal(url: str) -> str:
    with pytest.raises(InvalidRequest) as refused:
        require_public_url(url, "audio_url")
    assert refused.value.message.startswith("audio_url ")
    return refused.value.message


@pytest.mark.parametrize("url", UNCHANGED)
def test_public_ascii_passes_byte_for_byte(url: str) -> None:
    assert require_public_url(url, "audio_url") == url


@pytest.mark.parametrize("url", ENCODED)
def test_other_characters_are_encoded_once(url: str) -> None:
    encoded = require_public_url(url, "audio_url")

    assert encoded == ENCODED[url]
    assert require_public_url(encoded, "audio_url") == encoded


@pytest.mark.parametrize("host", NOT_PUBLIC)
def test_hosts_inside_are_refused(host: str) -> None:
    assert "公网" in refusal(f"http://{host}/a.mp3")
    assert "公网" in refusal(f"https://{host}:8080?a")


@pytest.mark.parametrize("host", NO_HOST)
def test_hosts_in_odd_spellings_are_refused(host: str) -> None:
    assert "无效" in refusal(f"http://{host}/a.mp3")


@pytest.mark.parametrize("url", MALFORMED)
def test_what_is_no_web_address_is_refused(url: str) -> None:
    assert "http" in refusal(url)


@pytest.mark.parametrize("port", ["0", "65536", "99999999999"])
def test_ports_out_of_range_are_refused(port: str) -> None:
    assert "端口" in refusal(f"https://example.com:{port}/a")


@pytest.mark.parametrize("login", ["user", "user:secret", ":secret", "user:", "127.0.0.1:80", ""])
def test_credentials_are_refused_and_not_repeated(login: str) -> None:
    message = refusal(f"https://{login}@example.com/a")

    assert "用户名或密码" in message
    assert "secret" not in message


@pytest.mark.parametrize("character", ["\t", "\n", "\r", "\0", "\x1b", "\x7f", "\x85", "\\", "\ud800"])
@pytest.mark.parametrize(
    "url", ["{}https://example.com/a", "ht{}tps://example.com", "https://exam{}ple.com/", "https://a.com/{}b"]
)
def test_control_characters_are_refused_wherever_they_are(url: str, character: str) -> None:
    assert "控制字符" in refusal(url.format(character))


@pytest.mark.parametrize("url", [" https://example.com/", "https://example.com/ ", "https://example.com/\u3000"])
def test_blanks_around_are_refused(url: str) -> None:
    assert "首尾空白" in refusal(url)


@pytest.mark.parametrize("url", ["https://example.com/a#b", "https://example.com#", "https://127.0.0.1#@example.com/"])
def test_a_fragment_is_refused(url: str) -> None:
    assert "%23" in refusal(url)


def test_the_length_is_limited_before_and_after_encoding() -> None:
    base = "https://example.com/"
    longest = base + "a" * (MAX_URL_CHARACTERS - len(base))

    assert require_public_url(longest, "audio_url") == longest
    assert "过长" in refusal(longest + "a")
    assert "编码后过长" in refusal(base + "音" * 500)


def test_a_long_url_of_any_kind_is_judged_at_once() -> None:
    for filler in ("[", "a.", "1", "例", "%", ":", "@", "a-", "::"):
        refusal("http://" + filler * (4000 // len(filler)))


@settings(derandomize=True)
@given(st.ip_addresses(v=4))
def test_ipv4_addresses_pass_only_when_global(address: ipaddress.IPv4Address) -> None:
    if address.is_global and not address.is_multicast:
        assert require_public_url(f"http://{address}/", "url") == f"http://{address}/"
    else:
        refusal(f"http://{address}/")


@settings(derandomize=True)
@given(st.ip_addresses(v=6))
def test_ipv6_addresses_never_pass_unless_global(address: ipaddress.IPv6Address) -> None:
    if not address.is_global or address.ipv4_mapped or address.sixtofour or address.teredo:
        refusal(f"http://[{address}]/")


@settings(derandomize=True)
@given(st.integers(0, 0xFFFFFFFF))
def test_ipv4_addresses_pass_in_one_spelling_only(number: int) -> None:
    first, rest = number >> 24, number & 0xFFFFFF
    for spelling in (
        str(number),
        hex(number),
        f"0{number:o}",
        f"{first}.{rest}",
        f"{hex(first)}.{rest}",
        f"{first:03o}.1.1.0x1",
    ):
        refusal(f"http://{spelling}/")


urls = st.text(max_size=60) | st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["http://", "https://", "HTTP:"]),
    st.text(st.sampled_from("abc019.-_:[]@%#?/ x例。１①\u200d\u0130ß"), max_size=30),
    st.sampled_from(["", ":80", "/", "?", ".com", "]"]),
    st.text(max_size=20),
)


@settings(derandomize=True)
@given(urls)
def test_any_text_is_refused_or_becomes_a_plain_address(url: str) -> None:
    public = None
    with suppress(InvalidRequest):
        public = require_public_url(url, "audio_url")
    if public is not None:
        assert re.fullmatch(r"(?i)https?://[!-~]+", public)
        assert require_public_url(public, "audio_url") == public

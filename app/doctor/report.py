"""The findings as lines for people or as JSON for programs. No secret gets past here."""

from collections import Counter
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import orjson

from app.doctor.finding import Finding
from app.settings import Settings

_WORDS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL", "skip": "skip"}
# A shorter one would hide too much else, and no text of ours is made of it.
MIN_HIDDEN_CHARS = 6
HIDDEN = "***"


def is_passed(findings: list[Finding]) -> bool:
    """Whether nothing fails."""
    return all(finding.level != "fail" for finding in findings)


def render(findings: list[Finding], secrets: list[str], *, as_json: bool = False) -> str:
    """Write the findings down, with none of the secrets in it."""
    shown = [
        Finding(each.check, each.level, _conceal(each.found, secrets), _conceal(each.advice, secrets))
        for each in findings
    ]
    if as_json:
        return orjson.dumps({"passed": is_passed(shown), "checks": shown}, option=orjson.OPT_INDENT_2).decode()
    width = max(len(each.check) for each in shown)
    lines = [
        f"{_WORDS[each.level]}  {each.check:<{width}}  {each.found}{each.advice and f'. {each.advice}'}"
        for each in shown
    ]
    counts = Counter(each.level for each in shown)
    total = f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed, {counts['skip']} skipped"
    return "\n".join([*lines, total])


def collect_secrets(settings: Settings, api_key: str | None) -> list[str]:
    """Everything that must never be shown, as far as it is given and not generated; those are never read out."""
    given = [
        settings.jwt_secret,
        settings.credential_keys,
        settings.oss_access_key_id,
        settings.oss_access_key_secret,
    ]
    secrets = [api_key or "", *(secret.get_secret_value() for secret in given if secret)]
    secrets += [part.strip() for part in secrets[1:] for part in part.split(",")]
    for url in (settings.database_url, settings.redis_url or ""):
        password = url.partition("://")[2].rpartition("@")[0].partition(":")[2]
        secrets += [password, unquote(password), quote(password)]
        secrets += [value for name, value in parse_qsl(urlsplit(url).query) if "password" in name.lower()]
    return sorted({each for each in secrets if len(each) >= MIN_HIDDEN_CHARS}, key=len, reverse=True)


def _conceal(text: str, secrets: list[str]) -> str:
    """The text on one line, without the secrets."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return " ".join(text.split())

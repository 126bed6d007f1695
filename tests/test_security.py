"""Sealing, tokens and password hashes: pure."""

import time
import uuid
from itertools import pairwise
from typing import Any

import pytest
import time_machine
from hypothesis import given
from hypothesis import strategies as st
from jose import jwt

from app.errors import SealBroken, Unauthorized
from app.security import KeySealer, TokenSigner, Use, count_guesses, hash_password, mask_api_key, verify_password

FIRST, SECOND = "first-sealing-key-" + "1" * 30, "second-sealing-key-" + "2" * 30
SECRET, OTHER_SECRET = "signing-secret-" + "s" * 30, "another-secret-" + "t" * 30
HEADERS = jwt.get_unverified_headers(TokenSigner((SECRET,), 60).issue(uuid.uuid4(), uuid.uuid4()))
API_KEY = "sk-test-0123456789abcdef"


def test_a_sealed_key_opens_for_its_user_only() -> None:
    owner, other = uuid.uuid4(), uuid.uuid4()
    sealer = KeySealer((FIRST,))
    sealed = sealer.seal(API_KEY, owner)
    assert API_KEY.encode() not in sealed
    assert sealer.open(sealed, owner) == (API_KEY, False)
    assert sealer.seal(API_KEY, owner) != sealed
    with pytest.raises(SealBroken):
        sealer.open(sealed, other)


def test_a_changed_byte_breaks_the_seal() -> None:
    owner = uuid.uuid4()
    sealer = KeySealer((FIRST,))
    sealed = sealer.seal(API_KEY, owner)
    for position in range(len(sealed)):
        damaged = bytes([*sealed[:position], sealed[position] ^ 1, *sealed[position + 1 :]])
        with pytest.raises(SealBroken):
            sealer.open(damaged, owner)
    for cut in (b"", sealed[:5], sealed[:13]):
        with pytest.raises(SealBroken):
            sealer.open(cut, owner)


def test_sealing_keys_rotate() -> None:
    owner = uuid.uuid4()
    old = KeySealer((FIRST,)).seal(API_KEY, owner)
    rotated = KeySealer((SECOND, FIRST))
    assert rotated.open(old, owner) == (API_KEY, True)
    renewed = rotated.seal(API_KEY, owner)
    assert rotated.open(renewed, owner) == (API_KEY, False)
    assert KeySealer((SECOND,)).open(renewed, owner) == (API_KEY, False)
    with pytest.raises(SealBroken):
        KeySealer((SECOND,)).open(old, owner)


def test_while_a_sealing_key_is_replaced_each_process_opens_what_others_seal() -> None:
    owner = uuid.uuid4()
    steps = [KeySealer(keys) for keys in ((FIRST,), (FIRST, SECOND), (SECOND, FIRST))]
    for one, next_one in pairwise(steps):
        for sealed in (one.seal(API_KEY, owner), next_one.seal(API_KEY, owner)):
            assert one.open(sealed, owner)[0] == next_one.open(sealed, owner)[0] == API_KEY


def test_a_token_names_its_user_until_it_expires() -> None:
    user_id, login_id = uuid.uuid4(), uuid.uuid4()
    signer = TokenSigner((SECRET,), 60)
    token = signer.issue(user_id, login_id)
    assert (signer.read(token).user_id, signer.read(token).login_id) == (user_id, login_id)
    assert signer.issue(user_id, login_id) != token
    with time_machine.travel(time.time() + 61), pytest.raises(Unauthorized):
        signer.read(token)


def claims_of_a_token() -> dict[str, Any]:
    """What a good access token says."""
    return jwt.get_unverified_claims(TokenSigner((SECRET,), 60).issue(uuid.uuid4(), uuid.uuid4()))


def forge(claims: dict[str, Any], secret: str = SECRET, algorithm: str = "HS256", **headers: Any) -> str:
    """A token of somebody who knows how ours look."""
    return jwt.encode(claims, secret, algorithm=algorithm, headers={**HEADERS, **headers})


@pytest.mark.parametrize("missing", ["sub", "exp", "iat", "jti", "sid", "use"])
def test_a_token_without_a_claim_is_refused(missing: str) -> None:
    claims = claims_of_a_token()
    signer = TokenSigner((SECRET,), 60)
    assert str(signer.read(forge(claims)).user_id) == claims["sub"]
    del claims[missing]
    with pytest.raises(Unauthorized):
        signer.read(forge(claims))


@pytest.mark.parametrize("kid", [None, 7, "", "x", "00000000", ["x"], {"x": 1}, "../../jwt_secret", "' OR 1=1 --"])
def test_a_token_of_an_unknown_key_is_refused(kid: Any) -> None:
    with pytest.raises(Unauthorized):
        TokenSigner((SECRET,), 60).read(forge(claims_of_a_token(), kid=kid))


ODD_CLAIMS: dict[str, list[Any]] = {
    "gen": ["1", None, [], {}, True, 1.5, -1, 2**31 - 1, 2**63],
    "exp": [10**18, 1e300, "never", None],
    **{name: ["", 7, None, [], "x" * 32, "../x"] for name in ("sub", "sid", "jti")},
    "use": [["access"]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in ODD_CLAIMS for value in ODD_CLAIMS[name]])
def test_odd_claims_are_refused_even_when_we_signed_them(name: str, value: Any) -> None:
    with pytest.raises(Unauthorized):
        TokenSigner((SECRET,), 60).read(forge({**claims_of_a_token(), name: value}))


@pytest.mark.parametrize(
    "password", ["4a8b({[<c3e6g9i!1|lo0s$5t+7x%z2z4@8({[<3", "x" * 128, "ab" * 64, "\U0001f600" * 128]
)
def test_a_password_is_judged_in_no_time(password: str) -> None:
    count_guesses("warm up")
    started = time.process_time()
    count_guesses(password, "x" * 64)
    assert time.process_time() - started < 0.5


def test_each_token_is_good_for_its_own_use_only() -> None:
    user_id, login_id = uuid.uuid4(), uuid.uuid4()
    signer = TokenSigner((SECRET,), 60)
    tokens: dict[Use, str] = {
        "access": signer.issue(user_id, login_id),
        "refresh": signer.issue_refresh(user_id, login_id, 7, 60),
        "ticket": signer.issue_ticket(user_id, login_id),
    }
    for made_for, token in tokens.items():
        for use in tokens:
            if use == made_for:
                assert signer.read(token, use).login_id == login_id
            else:
                with pytest.raises(Unauthorized):
                    signer.read(token, use)
    assert signer.read(tokens["refresh"], "refresh").generation == 7


def test_signing_keys_rotate() -> None:
    user_id, login_id = uuid.uuid4(), uuid.uuid4()
    old = TokenSigner((SECRET,), 60).issue(user_id, login_id)
    rotated = TokenSigner((OTHER_SECRET, SECRET), 60)
    assert rotated.read(old).login_id == login_id
    new = rotated.issue(user_id, login_id)
    assert TokenSigner((OTHER_SECRET,), 60).read(new).login_id == login_id
    for signer, token in ((TokenSigner((OTHER_SECRET,), 60), old), (TokenSigner((SECRET,), 60), new)):
        with pytest.raises(Unauthorized):
            signer.read(token)
    # What the former key signed is not believed in the name of the new one.
    with pytest.raises(Unauthorized):
        rotated.read(forge(claims_of_a_token(), SECRET, kid=jwt.get_unverified_header(new)["kid"]))


def test_other_algorithms_and_secrets_are_refused() -> None:
    claims = claims_of_a_token()
    signer = TokenSigner((SECRET,), 60)
    forged = [forge(claims, algorithm="HS384"), forge(claims, "x" * 40)]
    head, body, _ = forged[0].split(".")
    none = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0"
    for token in (*forged, f"{none}.{body}.", f"{head}.{body}.", f"{head}..", "..", "[" * 2000, "x" * 100_000):
        with pytest.raises(Unauthorized):
            signer.read(token)


@given(st.text(max_size=300))
def test_any_text_is_refused_as_a_token(token: str) -> None:
    with pytest.raises(Unauthorized):
        TokenSigner((SECRET,), 60).read(token)


def test_passwords_are_hashed_with_argon2id_and_checked() -> None:
    password_hash = hash_password("correct-horse-battery")
    assert password_hash.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert verify_password("correct-horse-battery", password_hash) == (True, None)
    assert verify_password("Correct-horse-battery", password_hash) == (False, None)
    assert verify_password("anything", "damaged") == (False, None)


def test_an_unknown_user_takes_the_time_of_a_known_one() -> None:
    password_hash = hash_password("correct-horse-battery")
    verify_password("warm up", None)

    def fastest(stored: str | None) -> float:
        times = []
        for _ in range(7):
            started = time.process_time()
            verify_password("wrong", stored)
            times.append(time.process_time() - started)
        return min(times)

    assert 0.5 < fastest(None) / fastest(password_hash) < 2


@pytest.mark.parametrize(
    ("key", "masked"),
    [
        (API_KEY, "sk-****cdef"),
        ("sk-short", "sk-****"),
        ("sk-12345678901", "sk-****"),
        ("sk-123456789012", "sk-****9012"),
    ],
)
def test_a_mask_hides_most_of_the_key(key: str, masked: str) -> None:
    assert mask_api_key(key) == masked

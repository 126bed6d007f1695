"""Audio storage: a small object is written, read back, fetched as players would, and removed again."""

import asyncio
import time
import uuid
from io import BytesIO

from oss2.exceptions import OssError, ServerError

from app.doctor.case import Case
from app.doctor.disk import examine_folder
from app.doctor.failures import explain_failure, name_host
from app.doctor.finding import Finding, fail, ok, warn
from app.errors import AppError, StorageError
from app.settings import Settings
from app.storage.keys import WORK_FOLDER
from app.storage.oss import OssStorage

CHECK = "storage"
WAIT_SECONDS = 2.5
PROBE_SECONDS = 6.0
REMOVE_SECONDS = 2.5
PROBE = b"written by `python -m app doctor`, which removes it again\n"
_GRANT = "Grant the access key oss:PutObject, oss:PutObjectAcl, oss:GetObject and oss:DeleteObject on the bucket."
_ADVICE_BY_CODE = {
    "AccessDenied": _GRANT,
    "InvalidAccessKeyId": "There is no such access key: correct OSS_ACCESS_KEY_ID.",
    "SignatureDoesNotMatch": "Correct OSS_ACCESS_KEY_SECRET, and see that OSS_REGION is the bucket's.",
    "InvalidArgument": "See that OSS_REGION and OSS_ENDPOINT are those of the bucket.",
    "NoSuchBucket": "Make the bucket, or correct OSS_BUCKET and OSS_ENDPOINT.",
    "RequestTimeTooSkewed": "Set this machine's clock: OSS refuses what is 15 minutes off.",
    "UserDisable": "The account is disabled or owes money: see the console of Alibaba Cloud.",
}


async def examine_storage(case: Case) -> list[Finding]:
    """Try the store that the settings name."""
    if case.settings.storage != "oss":
        return [await asyncio.to_thread(examine_folder, CHECK, case.settings.data_dir / "media")]
    try:
        store = await asyncio.to_thread(_connect, case.settings)
    except ValueError:
        return [fail(CHECK, "OSS_ENDPOINT or OSS_BUCKET is malformed", "See the example in .env.example.")]
    name = f"doctor-{uuid.uuid4()}.txt"
    try:
        shown, hidden, _ = await asyncio.gather(
            _probe(case, store, f"doctor/{name}"),
            _probe(case, store, f"{WORK_FOLDER}{name}", is_hidden=True),
            _read_clock(case),
        )
    finally:
        await store.close()
    if any(each.level == "fail" for each in shown):
        return shown
    return shown + hidden


def _connect(settings: Settings) -> OssStorage:
    """The product's client with less patience. Loading and making it takes about 0.3 s: call it in a thread."""
    key_id, key_secret = settings.oss_access_key_id, settings.oss_access_key_secret
    return OssStorage(
        endpoint=settings.oss_endpoint or "",
        region=settings.oss_region or "",
        bucket=settings.oss_bucket or "",
        access_key_id=key_id.get_secret_value() if key_id else "",
        access_key_secret=key_secret.get_secret_value() if key_secret else "",
        public_base_url=settings.oss_public_base_url,
        signed_urls=settings.oss_url_mode == "signed",
        timeout_seconds=WAIT_SECONDS,
    )


async def _probe(case: Case, store: OssStorage, key: str, *, is_hidden: bool = False) -> list[Finding]:
    """Put an object, look at it, and remove it whatever happens."""
    findings: list[Finding] = []
    is_stored = False
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await store.put(key, BytesIO(PROBE), content_type="text/plain")
            is_stored = True
            findings += await _examine_object(case, store, key, is_hidden=is_hidden)
    except TimeoutError:
        advice = "Check OSS_ENDPOINT; else a firewall, a security group or a proxy drops what is sent."
        findings.append(fail(CHECK, f"OSS did not do its work within {PROBE_SECONDS:g} s", advice))
    except AppError as error:
        findings.append(_refused(error))
    finally:
        left_behind = await _remove(store, key)
    return findings + left_behind if is_stored else findings


async def _examine_object(case: Case, store: OssStorage, key: str, *, is_hidden: bool) -> list[Finding]:
    began = time.perf_counter()
    async with store.open(key) as chunks:
        content = b"".join([chunk async for chunk in chunks])
    milliseconds = (time.perf_counter() - began) * 1000
    if content != PROBE:
        return [fail(CHECK, "OSS gave something else back than it was given", "Look at what is in between.")]
    if is_hidden:
        return await _examine_privacy(case, store, key)
    stored = ok(CHECK, f"OSS takes an object and gives it back, in {milliseconds:.0f} ms")
    return [stored, await _examine_playing(case, store, key)]


async def _remove(store: OssStorage, key: str) -> list[Finding]:
    try:
        async with asyncio.timeout(REMOVE_SECONDS):
            await store.delete(key)
    except (AppError, TimeoutError):
        return [warn(CHECK, f"the probe object {key} could not be removed", f"Remove it. {_GRANT}")]
    return []


async def _examine_playing(case: Case, store: OssStorage, key: str) -> Finding:
    """Fetch the object at the address that clients are given."""
    url = store.url(key)
    host = name_host(url)
    check = "playing"
    try:
        status, content = await case.http.send(case.http.build_request("GET", url), len(PROBE) * 100)
    except AppError as error:
        found, advice = explain_failure(error)
        return warn(check, f"{host} cannot be reached from here: {found}", f"{advice} Players may still reach it.")
    if status == 200 and content == PROBE:
        mode = "signed" if case.settings.oss_url_mode == "signed" else "public"
        return ok(check, f"players can fetch audio at {host} ({mode} addresses)")
    if status in {401, 403} and case.settings.oss_url_mode == "public":
        advice = "Set OSS_URL_MODE=signed, or make the bucket public-read (and turn Block Public Access off)."
        return fail(check, f"{host} answers {status}: the bucket is private, but addresses are not signed", advice)
    if status in {401, 403}:
        advice = "See that OSS_PUBLIC_BASE_URL leads to the bucket without a rule of its own, and check the clock."
        return fail(check, f"{host} answers {status} to a signed address", advice)
    advice = "See that OSS_PUBLIC_BASE_URL leads straight to the bucket of OSS_BUCKET."
    return fail(check, f"{host} answers {status} instead of the object", advice)


async def _examine_privacy(case: Case, store: OssStorage, key: str) -> list[Finding]:
    """Try to fetch an object that only we and the provider may hear, without a signature."""
    check = "privacy"
    address = store.url(key).partition("?")[0]
    try:
        status, _ = await case.http.send(case.http.build_request("GET", address), len(PROBE) * 100)
    except AppError:
        return []
    if status == 200:
        advice = "See that nothing in front of the bucket signs requests, and that it honours object ACLs."
        return [fail(check, "recorded voices can be fetched by anybody who knows their names", advice)]
    return [ok(check, "recorded voices and work in progress cannot be fetched without a signature")]


async def _read_clock(case: Case) -> None:
    endpoint = (case.settings.oss_endpoint or "").strip().rstrip("/")
    url = endpoint if "://" in endpoint else f"https://{endpoint}"
    asked_at = time.time()
    try:
        async with case.http.stream(case.http.build_request("GET", url)) as answer:
            case.clocks.read_header("OSS", answer, asked_at, strict=True)
    except AppError:
        return  # whether OSS can be reached is told by the probe, which goes by its own client


def _refused(error: AppError) -> Finding:
    """oss2's failure stands behind ours; of it, only the code may be told."""
    cause = error.__context__
    if isinstance(error, StorageError) and isinstance(cause, ServerError):
        if not cause.code:
            advice = "Check OSS_ENDPOINT: something else than OSS stands there, or in between."
            return fail(CHECK, f"what answers does not speak as OSS does (HTTP {cause.status})", advice)
        advice = _ADVICE_BY_CODE.get(cause.code, "Look the code up in the error list of Alibaba Cloud OSS.")
        return fail(CHECK, f"OSS refuses: {cause.code} (HTTP {cause.status})", advice)
    found, advice = explain_failure(cause if isinstance(cause, OssError | OSError) else error)
    return fail(CHECK, f"OSS cannot be reached: {found}", f"{advice} The address is OSS_ENDPOINT.")

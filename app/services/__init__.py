"""What the product does, wired together in one place."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from anyio import CapacityLimiter

from app.catalog import PriceList, load_prices
from app.completion import end_by_cancelling
from app.dashscope import (
    ENROLLMENT,
    ConnectionPool,
    Credential,
    EnrollmentClient,
    HttpClient,
    RecognitionClient,
    SpeechClient,
    TranscriptionClient,
    UploadClient,
)
from app.database import Database, is_outage
from app.inflight import InFlight
from app.preparation import prepare_database
from app.ratelimit import RateLimiter, burst_of
from app.security import KeySealer, TokenSigner
from app.services.accounts import AccountService
from app.services.administration import AdministrationService
from app.services.admission import SpeechAdmission
from app.services.archive import SpeechArchive
from app.services.backlog import BacklogService
from app.services.budgets import BudgetService
from app.services.cloning import CloningService
from app.services.collection import TaskCollector
from app.services.delivery import AudioDelivery
from app.services.enrollments import OpenEnrollments
from app.services.erasure import ErasureService
from app.services.following import VoiceFollower
from app.services.history import HistoryService
from app.services.live import LiveService
from app.services.logins import LoginService
from app.services.longtext import LongTextService
from app.services.narration import Tools
from app.services.narrator import Narrator
from app.services.passwords import Passwords
from app.services.recognition import RecognitionService
from app.services.records import RecordService
from app.services.registration import RegistrationService
from app.services.removals import Remover
from app.services.repeats import RepeatService
from app.services.retention import Retention
from app.services.samples import SampleService
from app.services.seeking import TaskSeeker
from app.services.segments import OpenTexts
from app.services.submissions import OpenSubmissions
from app.services.synthesis import SynthesisService
from app.services.tasks import OpenTasks
from app.services.transcription import TranscriptionService
from app.services.usage import UsageService
from app.services.vitals import watch_vitals
from app.services.voicebook import VoiceBook
from app.services.voices import VoiceService
from app.settings import Settings, load_secrets
from app.storage import Storage, create_storage

# Callers of one key and model that hold a connection while they wait for their turn.
MAX_SUBMISSIONS_AT_ONCE = 8
# A body with Base64 takes three times its size in memory while it is decoded: that many at once.
BODIES_DECODED_AT_ONCE = 2
# The provider allows 10 per second and account (PROTOCOL §3), which may have other callers than us.
ENROLLMENT_RATE = "5/second"


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that a route may call."""

    settings: Settings
    database: Database
    storage: Storage
    limiter: RateLimiter
    prices: PriceList
    logins: LoginService
    registration: RegistrationService
    administration: AdministrationService
    accounts: AccountService
    erasure: ErasureService
    history: HistoryService
    repeats: RepeatService
    budgets: BudgetService
    usage: UsageService
    backlog: BacklogService
    synthesis: SynthesisService
    long_text: LongTextService
    live: LiveService
    recognition: RecognitionService
    transcription: TranscriptionService
    cloning: CloningService
    voices: VoiceService
    decoding: CapacityLimiter
    in_flight: InFlight


@asynccontextmanager
async def open_services(settings: Settings) -> AsyncIterator[Services]:
    """Open every resource, and close them in order: work under way settles before what it needs goes away.

    Raises ValueError, OSError or RuntimeError when the settings, the price list or the database are not fit to start.
    """
    secrets = load_secrets(settings)
    prices = load_prices(settings.prices_file)
    async with AsyncExitStack() as resources:

        def keep_up(work: Coroutine[object, object, None]) -> None:
            resources.push_async_callback(end_by_cancelling, asyncio.create_task(work))

        database = Database(settings.database_url, settings.database_pool_size)
        resources.push_async_callback(database.close)
        await prepare_database(database, settings, secrets)
        keep_up(database.announcements.run())
        storage = await asyncio.to_thread(create_storage, settings, secrets)
        resources.push_async_callback(storage.close)
        keep_up(storage.run())
        limiter = RateLimiter(settings.redis_url)
        resources.push_async_callback(limiter.close)
        pool = ConnectionPool(handshake_seconds=settings.handshake_seconds)
        resources.push_async_callback(pool.close)
        keep_up(watch_vitals(database, pool))

        http = HttpClient(handshake_seconds=settings.handshake_seconds, silence_seconds=settings.upstream_timeout)
        resources.push_async_callback(http.close)

        async def wait_for_turn(credential: Credential, model: str) -> None:
            await limiter.wait(settings.upstream_rate, credential.fingerprint, model, party=credential.user)

        at_once = min(burst_of(settings.upstream_rate), MAX_SUBMISSIONS_AT_ONCE)
        speech = SpeechClient(pool, wait_for_turn, at_once, settings.upstream_timeout)
        passwords = Passwords(settings.password_guesses)
        signer = TokenSigner(secrets.jwt_secrets, settings.token_ttl_seconds)
        logins = LoginService(settings, database, signer, limiter, passwords)
        registration = RegistrationService(settings, database, limiter, passwords)
        administration = AdministrationService(database, registration, passwords)
        accounts = AccountService(settings, database, KeySealer(secrets.credential_keys), pool, speech)
        archive = SpeechArchive(settings, storage)
        records = RecordService(database, settings.zone, archive.measure_kept)
        history = HistoryService(database)
        budgets = BudgetService(database, settings.zone)
        keep_up(records.keep_leases())
        in_flight = InFlight(is_outage)
        resources.push_async_callback(in_flight.drain, settings.drain_seconds)
        repeats = RepeatService(database, history, in_flight)
        uploads = UploadClient(http)
        delivery = AudioDelivery(settings, database, storage, uploads, in_flight)

        async def wait_for_enrollment(credential: Credential) -> None:
            await limiter.wait(ENROLLMENT_RATE, credential.fingerprint, ENROLLMENT, party=credential.user)

        enrolling = EnrollmentClient(http, wait_for_enrollment)
        book = VoiceBook(database, enrolling, in_flight)
        samples = SampleService(settings, database, storage, delivery, uploads)
        enrollments = OpenEnrollments(database, records)
        follower = VoiceFollower(enrollments, book, accounts, enrolling, in_flight)
        cloning = CloningService(accounts, records, enrollments, follower, book, samples, enrolling, repeats, in_flight)
        voices = VoiceService(accounts, book, samples, enrolling, in_flight)
        admission = SpeechAdmission(accounts, voices, storage)
        synthesis = SynthesisService(prices, admission, records, speech, archive, storage, in_flight)
        live = LiveService(settings, prices, admission, records, budgets, speech, archive, storage, limiter, in_flight)
        texts = OpenTexts(database, records)
        narrator = Narrator(settings, Tools(texts, accounts, speech, storage, in_flight))
        long_text = LongTextService(settings, prices, admission, archive, records, history, narrator, in_flight)
        recognition = RecognitionService(
            settings, prices, accounts, records, RecognitionClient(http), delivery, in_flight
        )
        tasks = TranscriptionClient(http)
        collector = TaskCollector(OpenTasks(database, records), accounts, records, tasks, limiter, in_flight)
        submissions = OpenSubmissions(database, records)
        seeker = TaskSeeker(submissions, accounts, tasks, collector, in_flight)
        transcription = TranscriptionService(
            prices, database, accounts, records, tasks, delivery, collector, in_flight, submissions, seeker
        )
        remover = Remover(database, storage)
        erasure = ErasureService(database, accounts, remover, in_flight)
        retention = Retention(database, remover, settings.retention_days)
        if settings.background_jobs:
            for jobs in (samples, follower, narrator, collector, seeker, remover, erasure, retention):
                keep_up(jobs.run())
        yield Services(
            settings=settings,
            database=database,
            storage=storage,
            limiter=limiter,
            prices=prices,
            logins=logins,
            registration=registration,
            administration=administration,
            accounts=accounts,
            erasure=erasure,
            history=history,
            repeats=repeats,
            budgets=budgets,
            usage=UsageService(database),
            backlog=BacklogService(database),
            synthesis=synthesis,
            long_text=long_text,
            live=live,
            recognition=recognition,
            transcription=transcription,
            cloning=cloning,
            voices=voices,
            decoding=CapacityLimiter(BODIES_DECODED_AT_ONCE),
            in_flight=in_flight,
        )

"""Everything that a client can be told went wrong: one class per event.

AppError
├── InvalidRequest          400 INVALID_REQUEST
├── InvalidModel            400 INVALID_MODEL
├── InvalidVoice            400 INVALID_VOICE
├── ModelVoiceMismatch      400 MODEL_VOICE_MISMATCH
├── InvalidAudio            400 INVALID_AUDIO
│   └── AudioTooLarge           more bytes than are taken
├── AudioTooLong            400 AUDIO_TOO_LONG
├── TextTooLong             400 TEXT_TOO_LONG
├── WeakPassword            400 WEAK_PASSWORD
├── WrongPassword           400 WRONG_PASSWORD: of who wants another one
├── VoiceLimitExceeded      400 VOICE_LIMIT_EXCEEDED
├── Unauthorized            401 UNAUTHORIZED
│   ├── InvalidCredentials      wrong name or password
│   └── InvalidApiKey           the provider refuses the user's key
├── NoApiKey                403 NO_API_KEY
├── RegistrationClosed      403 REGISTRATION_CLOSED
├── InvalidInvite           403 INVALID_INVITE
├── AdminOnly               403 ADMIN_ONLY
├── BudgetExceeded          403 BUDGET_EXCEEDED: the call would exceed what the user allows himself a month
├── VoiceNotFound           404 VOICE_NOT_FOUND
├── TaskNotFound            404 TASK_NOT_FOUND
├── RecordNotFound          404 NOT_FOUND
├── ObjectNotFound          404 NOT_FOUND
├── UserNotFound            404 NOT_FOUND
├── InviteNotFound          404 NOT_FOUND
├── UsernameTaken           409 USERNAME_TAKEN
├── LastAdmin               409 LAST_ADMIN
├── IdempotencyConflict     409 IDEMPOTENCY_CONFLICT: the key names another request
├── AskedBefore             409 IDEMPOTENCY_CONFLICT: the same request was quicker; its answer is waited for
├── NoTranscript            409 NO_TRANSCRIPT: the task is not finished, or has failed
├── NotCancellable          409 NOT_CANCELLABLE: a call under way that cannot be stopped
├── Cancelled               409 CANCELLED: the user stopped it while somebody waited for it
├── PayloadTooLarge         413 PAYLOAD_TOO_LARGE: a body that is refused unread
├── IdleTimeout             408 IDLE_TIMEOUT: a live session in which nothing happens
├── RequestTimeout          408 REQUEST_TIMEOUT: a request that does not come to its end
├── Abandoned               499 ABANDONED: the client left before anything was bought
├── RateLimited             429 RATE_LIMITED
│   └── Throttled               the provider's own limit
├── HeadTooLarge            431 HEAD_TOO_LARGE: a request line with headers that is refused unread
├── SealBroken              500 INTERNAL_ERROR: a stored key cannot be opened
├── UpstreamError           502 UPSTREAM_ERROR
│   ├── ConnectionLost          the connection to the provider broke
│   │   └── Unreachable             none came up; no work was accepted
│   ├── UnclearAnswer           an answer that does not tell whether the work was done
│   ├── UpstreamNotFound        the provider knows nothing of this name
│   └── StorageError            the object store refused or could not be reached
├── NotReady                503 NOT_READY: the database or the store does not answer
│   ├── StorageFull             what would be paid for now could be kept nowhere
│   └── Restarting              this process is about to end, in the middle of a live session
└── UpstreamTimeout         504 TIMEOUT
    └── HandshakeTimeout        no connection came up in time

Messages are Chinese, say what to do, and never carry a key, a token or an internal path.
"""

from app.errors.access import (
    AdminOnly,
    BudgetExceeded,
    InvalidApiKey,
    InvalidCredentials,
    InvalidInvite,
    InviteNotFound,
    LastAdmin,
    NoApiKey,
    RateLimited,
    RegistrationClosed,
    SealBroken,
    Throttled,
    Unauthorized,
    UsernameTaken,
    UserNotFound,
    WeakPassword,
    WrongPassword,
)
from app.errors.input import (
    Abandoned,
    AskedBefore,
    AudioTooLarge,
    AudioTooLong,
    Cancelled,
    HeadTooLarge,
    IdempotencyConflict,
    IdleTimeout,
    InvalidAudio,
    InvalidModel,
    InvalidRequest,
    InvalidVoice,
    ModelVoiceMismatch,
    NotCancellable,
    NoTranscript,
    ObjectNotFound,
    PayloadTooLarge,
    RecordNotFound,
    RequestTimeout,
    TaskNotFound,
    TextTooLong,
    VoiceLimitExceeded,
    VoiceNotFound,
)
from app.errors.root import (
    AppError,
)
from app.errors.upstream import (
    ConnectionLost,
    HandshakeTimeout,
    NotReady,
    Restarting,
    StorageError,
    StorageFull,
    UnclearAnswer,
    Unreachable,
    UpstreamError,
    UpstreamNotFound,
    UpstreamTimeout,
)

__all__ = [
    "Abandoned",
    "AdminOnly",
    "AppError",
    "AskedBefore",
    "AudioTooLarge",
    "AudioTooLong",
    "BudgetExceeded",
    "Cancelled",
    "ConnectionLost",
    "HandshakeTimeout",
    "HeadTooLarge",
    "IdempotencyConflict",
    "IdleTimeout",
    "InvalidApiKey",
    "InvalidAudio",
    "InvalidCredentials",
    "InvalidInvite",
    "InvalidModel",
    "InvalidRequest",
    "InvalidVoice",
    "InviteNotFound",
    "LastAdmin",
    "ModelVoiceMismatch",
    "NoApiKey",
    "NoTranscript",
    "NotCancellable",
    "NotReady",
    "ObjectNotFound",
    "PayloadTooLarge",
    "RateLimited",
    "RecordNotFound",
    "RegistrationClosed",
    "RequestTimeout",
    "Restarting",
    "SealBroken",
    "StorageError",
    "StorageFull",
    "TaskNotFound",
    "TextTooLong",
    "Throttled",
    "Unauthorized",
    "UnclearAnswer",
    "Unreachable",
    "UpstreamError",
    "UpstreamNotFound",
    "UpstreamTimeout",
    "UserNotFound",
    "UsernameTaken",
    "VoiceLimitExceeded",
    "VoiceNotFound",
    "WeakPassword",
    "WrongPassword",
]

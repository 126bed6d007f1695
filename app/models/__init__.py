"""Every table. Money is exact, time is UTC, and a bill line is never changed once it is written."""

from app.models.calls import Bill, LongText, Record, Segment, SubmittedFile, Subtotal, Transcription, Watched
from app.models.people import ApiKey, Invite, Login, UsedTicket, User
from app.models.table import PROVIDER_ID_CHARS, Table
from app.models.upkeep import Erasure, GeneratedSecret, Removal
from app.models.voices import Enrollment, Voice, VoiceListing, VoiceSample

__all__ = [
    "PROVIDER_ID_CHARS",
    "ApiKey",
    "Bill",
    "Enrollment",
    "Erasure",
    "GeneratedSecret",
    "Invite",
    "Login",
    "LongText",
    "Record",
    "Removal",
    "Segment",
    "SubmittedFile",
    "Subtotal",
    "Table",
    "Transcription",
    "UsedTicket",
    "User",
    "Voice",
    "VoiceListing",
    "VoiceSample",
    "Watched",
]

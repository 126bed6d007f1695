"""When each sentence of a synthesis is heard, told by how much audio came before it (PROTOCOL §1.5)."""

from dataclasses import dataclass

from app.dashscope.frames import Event, SpokenWord


@dataclass(frozen=True, slots=True)
class SpokenSentence:
    """A sentence between two points of its task's audio, in bytes of the audio's format.

    `text` is empty where the provider did not say it; the times of `words` are as the provider tells them.
    """

    text: str
    begin_bytes: int
    end_bytes: int
    words: tuple[SpokenWord, ...] = ()


class Timeline:
    """Follows one task: its events and its audio, in the order in which they come."""

    def __init__(self) -> None:
        self.sentences: list[SpokenSentence] = []
        self.words: tuple[SpokenWord, ...] = ()
        """All words of the task, where they come with its end."""
        self._heard_bytes = 0
        self._begin_bytes = 0
        self._text = ""

    def hear(self, audio: bytes) -> None:
        """Count a frame of audio."""
        self._heard_bytes += len(audio)

    def note(self, event: Event) -> None:
        """Take what an event tells about sentences."""
        if event.output == "sentence-begin":
            self._begin_bytes, self._text = self._heard_bytes, event.text
        elif event.output == "sentence-end":
            text = event.text or self._text
            self.sentences.append(SpokenSentence(text, self._begin_bytes, self._heard_bytes, event.words))
            self._begin_bytes, self._text = self._heard_bytes, ""
        elif event.name == "task-finished":
            self.words = event.words

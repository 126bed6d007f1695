"""Which recognition model may be used how: checked before anything else."""

import re
from typing import Literal

from app.catalog import RecognitionModel, find_recognition_model
from app.errors import InvalidModel, InvalidRequest

MAX_CONTEXT_TOKENS = 10_000  # PROTOCOL §4.1
_WIDE = re.compile("[\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef]")


def require_recognizer(model_id: str, context: str | None, *, call_type: Literal["sync", "async"]) -> RecognitionModel:
    """The model, if it is for this way of calling and takes the context. Raises InvalidModel or InvalidRequest."""
    model = find_recognition_model(model_id)
    if model is None:
        raise InvalidModel(f"无效的模型名称：{model_id[:64]}，可用模型见 /api/audio/asr/models")
    if model.call_type != call_type:
        route = "recognize" if model.call_type == "sync" else "transcribe"
        raise InvalidModel(f"模型 {model_id} 不能用于此接口，请使用 /api/audio/asr/{route}")
    if context and not model.takes_context:
        raise InvalidRequest(f"context 不能与 {model_id} 一起使用：该模型不支持上下文提示")
    if context and _estimate_tokens(context) > MAX_CONTEXT_TOKENS:
        raise InvalidRequest(f"context 过长，不能超过 {MAX_CONTEXT_TOKENS} Token")
    return model


def _estimate_tokens(text: str) -> float:
    """A low estimate, so that nothing is refused that the provider would take."""
    wide = len(_WIDE.findall(text))
    return wide / 1.8 + (len(text) - wide) / 5

"""Which `instruction` a voice accepts (PROTOCOL.md §1.9): length, the instruct flag and the fixed templates."""

from __future__ import annotations

import re
from typing import Final

from app.sandbox.characters import count_characters
from app.sandbox.failures import INSTRUCTION_REFUSED, TaskFailed
from app.sandbox.voice_catalog import Voice

LONGEST_INSTRUCTION: Final = 100

_FEELING: Final = r"你说话的情感是(?:neutral|fearful|angry|sad|surprised|happy|disgusted)。"


def _scene(scenes: str) -> str:
    return rf"你正在进行(?:{scenes})，{_FEELING}"


def _templates(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns))


_LONGANHUAN_SCENES: Final = "闲聊对话|比赛解说|深夜电台广播|诗歌朗诵|科普知识推广|产品推广|脱口秀表演"
_LONGANHUAN_ROLE: Final = rf"你说话的角色是温和客服，{_FEELING}"

_TEMPLATES: Final[dict[tuple[str, str], re.Pattern[str]]] = {
    ("longanyang", ""): _templates(
        _FEELING,
        _scene("闲聊互动|新闻播报|广告促销|比赛解说|一些儿童内容解说|语音导航|脱口秀表演"),
        rf"你现在说话的角色是一个旁白，{_FEELING}",
        rf"你正在以一个故事机的身份说话，{_FEELING}",
    ),
    ("longanhuan", "cosyvoice-v3-plus"): _templates(_FEELING, _scene(_LONGANHUAN_SCENES), _LONGANHUAN_ROLE),
    ("longanhuan", "cosyvoice-v3-flash"): _templates(
        _FEELING, _scene(f"{_LONGANHUAN_SCENES}|剧情解说|课堂教学"), _LONGANHUAN_ROLE
    ),
    ("longhuhu_v3", ""): _templates(
        _FEELING,
        _scene("自由对话|广告促销"),
        rf"你说话的角色是(?:傲娇公主|元气少女|可爱孩童|机器人|小猪佩奇)，{_FEELING}",
        rf"你正在以一个(?:故事机|儿童玩具)的身份说话，{_FEELING}",
    ),
    ("longanhuan_v3", ""): _templates(r"请用(?:普通话|广东话|东北话|河南话|湖南话|陕西话|山东话|四川话|安徽话)表达。"),
}


def check_instruction(model: str, voice: Voice, instruction: str) -> None:
    """Raise failure 428 unless this voice of this model may be told this (§1.9).

    v3.5 voices and v3-flash clones take any text; flagged system voices only their templates; nobody else takes any.
    """
    if not instruction:
        return
    if count_characters(instruction) > LONGEST_INSTRUCTION:
        raise TaskFailed(INSTRUCTION_REFUSED)
    if model.startswith("cosyvoice-v3.5-") or (voice.cloned and model == "cosyvoice-v3-flash"):
        return
    templates = _TEMPLATES.get((voice.voice_id, "")) or _TEMPLATES.get((voice.voice_id, model))
    if not voice.instruct or templates is None or not templates.fullmatch(instruction):
        raise TaskFailed(INSTRUCTION_REFUSED)

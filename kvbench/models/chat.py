"""Every chat is rendered here: one clock, one set of settings, one template of a checkpoint that has several.

What a template writes must depend on the checkpoint and the data alone, never on the day or the machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from kvbench.errors import ModelSupportError

if TYPE_CHECKING:
    from kvbench.models.loader import LoadedModel

# The day on which every template believes to be: the one that Llama 3's falls back to.
CLOCK = datetime(2024, 7, 26)
ANSWER_MARK = "\ue000answer\ue000"  # private use: no data set writes it


# What templates that ask for it are told: answers come without reasoning first, as the references do, and it is
# always the same day.
_SETTINGS: Mapping[str, Any] = {"enable_thinking": False, "date_string": CLOCK.strftime("%d %b %Y")}
_DIRECTIVES = (
    "a",
    "A",
    "w",
    "d",
    "-d",
    "e",
    "b",
    "h",
    "B",
    "m",
    "-m",
    "y",
    "Y",
    "C",
    "G",
    "u",
    "V",
    "j",
    "-j",
    "U",
    "W",
)
_TIMES = (
    "H",
    "-H",
    "k",
    "I",
    "-I",
    "l",
    "M",
    "-M",
    "S",
    "-S",
    "f",
    "p",
    "P",
    "z",
    "Z",
    "c",
    "x",
    "X",
    "F",
    "D",
    "T",
    "R",
)


def _stopped_clock() -> str:
    """Return a macro in the place of transformers' `strftime_now`, which reads the machine's clock.

    A function cannot be handed to a template through `apply_chat_template`. The line end after it belongs to the
    macro, so that the template begins a line, as before.
    """
    words = "".join(f" | replace('%{one}', '{CLOCK.strftime(f'%{one}')}')" for one in (*_DIRECTIVES, *_TIMES))
    told = f"format | replace('%%', '\\0'){words} | replace('\\0', '%')"
    return f"{{% macro strftime_now(format) %}}{{{{ {told} }}}}{{% endmacro %}}\n"


def default_template(found: Any) -> str | None:
    """Return the template that chats use, of one, several by name (a dict or a list of dicts), or none.

    Raises: ModelSupportError if there are several and none is called `default`.
    """
    if found is None or isinstance(found, str):
        return found or None
    named = found if isinstance(found, Mapping) else {one["name"]: one["template"] for one in found}
    if "default" not in named:
        raise ModelSupportError(
            f"the checkpoint has {len(named)} chat templates ({', '.join(sorted(named)) or 'no names'}), none of them "
            "named 'default'; name one of them so in its files, or choose a format with model.prompt"
        )
    return str(named["default"])


def message(loaded: LoadedModel, role: str, text: str, *, with_image: bool = False) -> dict[str, Any]:
    """Return one message in the form that the family's templates read; `text` is shielded already."""
    if not loaded.takes_images:
        return {"role": role, "content": text}
    return {"role": role, "content": [{"type": "image"}] * with_image + [{"type": "text", "text": text}]}


def render_chat(loaded: LoadedModel, chat: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
    """Return `chat` as the checkpoint's template writes it, the same on every day.

    Raises: ModelSupportError without a template, or if the template refuses the chat.
    """
    template = loaded.chat_template
    if template is None:
        raise ModelSupportError("the checkpoint has no chat template, so a chat has no form; leave the task out")
    settings = {name: value for name, value in _SETTINGS.items() if name in template}
    from jinja2 import TemplateError

    try:
        text: str = loaded.tokenizer.apply_chat_template(
            list(chat),
            chat_template=_stopped_clock() + template if "strftime_now" in template else template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **settings,
        )
    except TemplateError as error:
        raise ModelSupportError(
            f"the chat template refuses the chat: {' '.join(str(error).split())}; choose another with model.prompt"
        ) from error
    return text


def end_token_written(loaded: LoadedModel) -> int | None:
    """Return the control token that the template writes after an answer (<|im_end|>, <|eot_id|>); None if it has none.

    White space may stand before it.
    """
    if loaded.chat_template is None:
        return None
    try:
        chat = [message(loaded, "user", "?"), message(loaded, "assistant", ANSWER_MARK)]
        _, mark, after = render_chat(loaded, chat, add_generation_prompt=False).rpartition(ANSWER_MARK)
    except ModelSupportError:
        return None
    found = loaded.text.first_control_token(after.lstrip()) if mark else None
    return None if found == loaded.tokenizer.bos_token_id else found

"""Every chat is rendered here, and every text becomes tokens here: one clock, one set of settings, one template.

What a template writes must depend on the checkpoint and the data alone, never on the day or the machine; of several
templates of a checkpoint one is used; what it writes between an answer and the next one is found by asking it.

What a template writes may be control tokens, what data holds is always plain text. But a tokenizer takes every `</s>`
or `<|im_end|>` that it meets for the control token, whoever wrote it. So data is
shielded before a template sees it: what looks like a control token becomes a few letters of private use. Where
nothing looks like one, which is nearly always, the tokenizer gets the very text. Where something does, a copy of the
tokenizer is used that knows the control tokens under names that no text can hold, so that the shielded words, put
back, go through its ordinary pipeline, together with their neighbours.

transformers' own means do not do this: `split_special_tokens` takes the template's tokens apart too, and leaves
added tokens that are not called special (Qwen3's <think>) whole; `sanitize_control_tokens` came with 5.24 and
tokenizes the pieces of a text one by one, so that words at their joints become other tokens.
"""

from __future__ import annotations

import json
import re
import secrets
from array import array
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from kvbench.datasets.base import Example
from kvbench.errors import DataError, ModelSupportError

if TYPE_CHECKING:
    from kvbench.models.loader import LoadedModel

# The day on which every template believes to be: the one that Llama 3's falls back to.
CLOCK = datetime(2024, 7, 26)
ANSWER_MARK = "\ue000answer\ue000"  # private use: no data set writes it
# What templates that ask for it are told: answers come without reasoning first, as the references do, and it is
# always the same day.
_SETTINGS: Mapping[str, Any] = {"enable_thinking": False, "date_string": CLOCK.strftime("%d %b %Y")}
# What `strftime` knows of the day and of the time.
_DIRECTIVES = (*"aAwdebhBmyYCGuVjUWHkIlMSfpPzZcxXFDTR", *(f"-{letter}" for letter in "dmjHIMS"))


def _stopped_clock() -> str:
    """Return a macro in the place of transformers' `strftime_now`, which reads the machine's clock.

    A function cannot be handed to a template through `apply_chat_template`. The line end after it belongs to the
    macro, so that the template begins a line, as before.
    """
    words = "".join(f" | replace('%{one}', '{CLOCK.strftime(f'%{one}')}')" for one in _DIRECTIVES)
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
    try:
        text: str = loaded.tokenizer.apply_chat_template(
            list(chat),
            chat_template=_stopped_clock() + template if "strftime_now" in template else template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **settings,
        )
    except Exception as error:  # a template is a program: it may divide by zero as well
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


def next_turn_tokens(loaded: LoadedModel, example: Example, number: int) -> list[int]:
    """Return the tokens from the end of answer `number` - 1 to the begin of answer `number` (2 or more).

    They close the answer as the chat template does, ask the follow-up question and open the next
    answer. Raises: ModelSupportError without a chat template, or with one that drops earlier answers.
    """
    shield = loaded.text.shield
    first = shield(example.context + example.question)
    chat = [message(loaded, "user", first, with_image=example.load_image is not None)]
    for turn in example.follow_ups[: number - 1]:
        chat += [message(loaded, "assistant", ANSWER_MARK), message(loaded, "user", shield(turn.question))]
    rendered = render_chat(loaded, chat)
    if rendered.count(ANSWER_MARK) != number - 1:
        raise ModelSupportError("the chat template does not repeat earlier answers as they are; leave the task out")
    return loaded.text.ids(rendered.rpartition(ANSWER_MARK)[2], add_special_tokens=False)


_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # private use; what data holds of them is shielded too
_DIGITS = "\ue100\ue101\ue102\ue103\ue104\ue105\ue106\ue107\ue108\ue109"  # no template's filter changes them
_MOST_TEXTS = 1024
_SHIELDED = re.compile(f"{_OPEN}([{_DIGITS}]+){_CLOSE}")
_PROBE = "a"


class TextTokens:
    """The tokenizer of one checkpoint, as data and templates use it.

    template: the chat template, None without one. check: is given all tokens of a text, to refuse those that the model
    has no place for. Texts are remembered: every cell of a sweep asks for the same ones several times.
    """

    def __init__(
        self, tokenizer: Any, template: str | None, check: Callable[[Sequence[int]], None] = lambda ids: None
    ) -> None:
        self._tokenizer, self._check = tokenizer, check
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._added: dict[str, int] = {token.content: int(index) for index, token in added.items()}
        self._words = {index: text for text, index in self._added.items()}
        literals = _literals(template)
        special = set(tokenizer.all_special_tokens)
        special |= {token.content for token in added.values() if token.special}
        written = {text for text in self._added if not text.isspace() and any(text in one for one in literals)}
        control = special | written
        self._shieldable = [*sorted(control, key=lambda text: (-len(text), text)), _OPEN, _CLOSE]
        self._control_ids = {self._added[text] for text in control if text in self._added}
        longest_first = sorted(self._shieldable, key=len, reverse=True)
        self._data = re.compile("|".join(map(re.escape, longest_first)))
        self._remembered = lru_cache(maxsize=_MOST_TEXTS)(self._checked_ids)

    def shield(self, text: str) -> str:
        """Return data's `text` with what looks like a control token made unrecognisable, to put into a template."""
        return self._data.sub(lambda found: _hidden(self._shieldable.index(found[0])), text)

    def unshielded(self, text: str) -> str:
        """Return shielded or rendered `text` as people read it."""
        return _SHIELDED.sub(lambda found: self._shieldable[_number(found[1])], text)

    def boundary(self, text: str, at: int) -> int:
        """Return `at`, or the begin of what looks like a control token if `at` is inside of it."""
        return next((found.start() for found in self._data.finditer(text) if found.start() < at < found.end()), at)

    def ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the tokens of shielded or rendered `text`, without an end token that the tokenizer appends.

        add_special_tokens: with what the tokenizer puts before a text, such as the begin token. Raises: DataError
        for shielded text that the tokenizer cannot write as plain text, ModelSupportError for what `check` refuses.
        """
        return self._remembered(text, add_special_tokens).tolist()

    def _checked_ids(self, text: str, add_special_tokens: bool) -> array[int]:
        ids = self._ids(text, add_special_tokens)
        self._check(ids)
        return array("q", ids)  # a list of numbers takes six times as much

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        before, after, after_bare = self._around
        if _OPEN in text:
            return [*(before if add_special_tokens else ()), *self._plain_ids(text)]
        ids: list[int] = list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        appended = after if add_special_tokens else after_bare
        return ids[: len(ids) - len(appended)] if appended and ids[-len(appended) :] == appended else ids

    def first_control_token(self, text: str) -> int | None:
        """Return the control token that the template's `text` begins with."""
        ids = self.ids(text, add_special_tokens=False)
        return ids[0] if ids and ids[0] in self._control_ids else None

    @cached_property
    def _around(self) -> tuple[list[int], list[int], list[int]]:
        """What is put before and after every text, and after it although nothing should be added."""
        bare: list[int] = list(self._tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
        end = self._tokenizer.eos_token_id
        after_bare = bare[-1:] if len(bare) > 1 and bare[-1] == end else []
        core = bare[: len(bare) - len(after_bare)]
        whole: list[int] = list(self._tokenizer(_PROBE, add_special_tokens=True)["input_ids"])
        for start in range(len(whole) - len(core) + 1):
            if whole[start : start + len(core)] == core:
                return whole[:start], whole[start + len(core) :], after_bare
        raise ModelSupportError(
            "the tokenizer gives a text other tokens when it adds special ones; kvbench needs them alike"
        )

    def _plain_ids(self, text: str) -> list[int]:
        renamed, original_ids, names = self._renamed
        ids = renamed.encode(self.unshielded(self._with_names(text, names)), add_special_tokens=False).ids
        shielded = {self._shieldable[_number(letters)] for letters in _SHIELDED.findall(text)}
        forged = {self._added[word]: word for word in shielded if word in self._added}
        forged.pop(self._tokenizer.unk_token_id, None)
        word = next((forged[index] for index in ids if index in forged and index not in original_ids), None)
        if word is not None:
            raise DataError(f"a text of the data holds {word!r}, which this tokenizer writes as a control token always")
        return [original_ids.get(index, index) for index in ids]

    def _with_names(self, text: str, names: Mapping[int, str]) -> str:
        """Return shielded `text` with its control tokens renamed: those that the tokenizer itself finds there.

        It knows rules of its own: Llama 2's of old are none without a blank before them.
        """
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pieces, told = [], 0
        for index, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            word = self._words.get(index)
            at = -1 if word is None else text.find(word, start, end)
            if word is not None and at >= told:
                pieces += [text[told:at], names[index]]
                told = at + len(word)
        return "".join([*pieces, text[told:]])

    @cached_property
    def _renamed(self) -> tuple[Any, dict[int, int], dict[int, str]]:
        """A copy of the tokenizer with other names for added tokens: the copy, their ids by its own, new names by id.

        The new names are drawn, so that no data can hold them. No name is in the vocabulary of the model, so the copy
        numbers them from its end on.
        """
        from tokenizers import Tokenizer

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                "a text of the data holds what looks like a control token, and the checkpoint's tokenizer "
                f"({type(self._tokenizer).__name__}) is none of the tokenizers library, which alone can write it as "
                "plain text; leave the item out"
            )
        state = json.loads(backend.to_str())
        drawn = secrets.token_hex(8)
        names: dict[int, str] = {}
        for token in state["added_tokens"]:
            token["content"] = names[token["id"]] = f"\ue0f2{drawn}.{token['id']}\ue0f3"
        state["padding"] = state["truncation"] = None
        renamed = Tokenizer.from_str(json.dumps(state))
        original_ids = {int(renamed.token_to_id(name) or 0): index for index, name in names.items()}
        if original_ids.keys() & set(renamed.get_vocab(with_added_tokens=False).values()):
            raise ModelSupportError(
                "a text of the data holds what looks like a control token, and the numbers of the tokenizer's "
                "vocabulary have gaps, so that it cannot be written as plain text; leave the item out"
            )
        return renamed, original_ids, names


def _hidden(number: int) -> str:
    return _OPEN + "".join(_DIGITS[int(digit)] for digit in str(number)) + _CLOSE


def _number(letters: str) -> int:
    return int("".join(str(_DIGITS.index(letter)) for letter in letters))


def _literals(template: str | None) -> list[str]:
    """Return what a template writes as it stands: text between its tags, and its string constants."""
    if template is None:
        return []
    from jinja2 import Environment, TemplateSyntaxError

    try:
        return [value for _, kind, value in Environment().lex(template) if kind in ("data", "string")]
    except TemplateSyntaxError as error:
        raise ModelSupportError(
            f"the chat template is no template: {error}; choose a format with model.prompt"
        ) from error

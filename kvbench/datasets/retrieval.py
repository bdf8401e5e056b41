"""Long texts and what must be found in them: needle, passkey and RULER files, LongBench, and what is made here.

A row of a file has `input` and what is expected (`outputs`, `answers`, `answer` or `target`). Every expected text is
a fact, so an answer is also scored by how many it names.

`Needles` makes haystacks from a seed, of a text file (or a folder of them) or of synthetic filler sentences, and hides
a passkey or a sentence at a known depth. Depths are spread evenly over the examples, so that a table by depth is one
group-by away: the id holds it. `Recall` is what a small model can do that follows no instruction: a text gives keys
their values and begins to state one of them again.

LongBench (arXiv 2308.14508) has JSON lines of `input`, `context`, `answers`, with a prompt per task. The prompt is a
template with {context} and {input}; everything up to the context's end is context, the rest is the question (a template
that asks before the context has no part to hide). Prompts are put into the model's chat template where it has one (the
benchmark's own scripts leave it out for few-shot and code tasks), and nothing is cut out of the middle.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from kvbench.datasets.base import MOST_MADE, Example, Fields, checked_text, without_marks
from kvbench.datasets.files import FileDataset, Row, read_text, texts_by_id
from kvbench.errors import ConfigError, DataError, check_within, close_matches

_CONTEXT, _INPUT = "{context}", "{input}"


@dataclass(frozen=True, kw_only=True)
class LongBench(FileDataset):
    """Examples of one task's file, each its own cluster; the reference is the first answer.

    templates: the benchmark's `dataset2prompt.json` (task -> template); the task is the row's `dataset`, else
    the file's name up to its first dot. Without it `template` serves for all. A row without an answer is bad.
    """

    template: str = "{context}\n\n{input}"
    templates: str | None = None

    def _check_settings(self) -> None:
        _check_template(self.template, "dataset.template")

    @cached_property
    def _by_task(self) -> Mapping[str, str] | None:
        return texts_by_id(self.templates, "templates") if self.templates else None

    def _example(self, row: Row) -> Example:
        fields = row.fields("input", "context", "answers")
        name = fields.id("_id", "id", default=row.number)
        before, after = self._template(fields).split(_CONTEXT)
        asked = fields.content.get("input")
        if not isinstance(asked, str):
            raise DataError(
                f"{row.where} has the input {str(asked)[:80]!r}; it must be text, empty where nothing is asked"
            )
        context, question = before.replace(_INPUT, asked) + fields.text("context"), after.replace(_INPUT, asked)
        if not question.strip() or (_INPUT in before and asked):
            context, question = "", context + question
        return Example(
            id=name, cluster=name, context=context, question=question, reference=answers_of(fields, "answers")[0]
        )

    def _template(self, fields: Fields) -> str:
        if self._by_task is None:
            return self.template
        task = str(fields.content.get("dataset") or Path(self.path).name.split(".")[0])
        if task not in self._by_task:
            raise DataError(
                f"{fields.where} is of the task {task!r}, which has no template; {close_matches(task, self._by_task)}"
            )
        _check_template(self._by_task[task], f"the template of {task!r} in {self.templates}")
        return self._by_task[task]


def _check_template(template: str, name: str) -> None:
    if template.count(_CONTEXT) != 1:
        raise ConfigError(f"{name} is {template[:80]!r}; it must hold {_CONTEXT} once, and may hold {_INPUT}")


def answers_of(fields: Fields, name: str) -> list[str]:
    """Return a list of texts: JSON's, one text or number, or the text of a Python list (as some copies have it)."""
    found = fields.content.get(name)
    if isinstance(found, str) and found.lstrip().startswith("["):
        try:
            found = ast.literal_eval(found.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise DataError(f"{fields.where} has {name} that begin a list and end otherwise ({error})") from error
    items = found if isinstance(found, list) else [found]
    if not items or any(isinstance(item, bool) or not isinstance(item, str | int) for item in items):
        raise DataError(f"{fields.where} has the {name} {str(found)[:80]!r}; it must be a text or a list of texts")
    return [checked_text(str(item), name, fields.where) for item in items]


_EXPECTED = ("outputs", "answers", "answer", "target")


@dataclass(frozen=True, kw_only=True)
class Retrieval(FileDataset):
    """Examples of a JSON or JSONL file, each its own cluster.

    question: what is asked after every `input` where rows have no `question` of their own; null: the last
    line of `input` is the question (RULER). The id is the row's `index` or `id`, else its number.
    """

    question: str | None = None

    def _example(self, row: Row) -> Example:
        fields = row.fields("input", "outputs")
        name = fields.id("index", "id", default=row.number)
        held = next((expected for expected in _EXPECTED if expected in fields.content), None)
        if held is None:
            raise DataError(f"{row.where} says not what is expected; it needs one of {', '.join(_EXPECTED)}")
        expected = answers_of(fields, held)
        text = fields.text("input")
        question = fields.text("question") if "question" in fields.content else (self.question or "").strip()
        if question:
            context = f"{text}\n"
        else:
            before, line, question = text.rpartition("\n")
            context = before + line
        return Example(
            id=name,
            cluster=name,
            context=context,
            question=question,
            reference=", ".join(expected),
            facts=frozenset(expected),
            fact_noun="needles",
        )

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(str(fact) for example in self.examples() for fact in example.facts or ())

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return every text expected anywhere in the data set that `text` holds, as RULER counts (a substring)."""
        return frozenset(known for known in self._known if known in text)


Kind = Literal["passkey", "needle"]
_VERSION = 1
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_NUMBER = re.compile(r"\d+")
# A filler sentence takes one of each: who does what and when.
_FILLER = (
    ("gardener", "sailor", "baker", "teacher", "painter", "miller", "doctor", "pilot"),
    ("walks past", "looks at", "talks about", "waits beside", "remembers", "draws"),
    ("the old bridge", "a quiet street", "the harbour", "a field of wheat", "the market", "a wooden door"),
    ("in the morning", "after the rain", "on a Sunday", "before supper", "late in autumn", "every other day"),
)
# What is hidden, and what asks for it.
_NEEDLES = {
    "passkey": ("The pass key is {}. Remember it.", "What is the pass key mentioned in the text?"),
    "needle": ("The magic number of the city of Aran is {}.", "What is the magic number of the city of Aran?"),
}


def _filler_sentence(rng: random.Random) -> str:
    return f"The {' '.join(map(rng.choice, _FILLER))}."


@dataclass(frozen=True, kw_only=True)
class Needles:
    """`num_samples` haystacks of `context_words` words, the needle at one of `num_depths` depths from 0 to 1.

    kind: `passkey` hides a number of `digits` digits, `needle` a sentence about a city. filler: a text file or
    a folder of .txt files in the place of synthetic sentences. Raises: ConfigError, DataError.
    """

    num_samples: int = 20
    kind: Kind = "passkey"
    context_words: int = 400
    num_depths: int = 5
    digits: int = 5
    filler: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"dataset.kind is {self.kind!r}; {close_matches(self.kind, get_args(Kind))}")
        made, at_least_1 = (1, MOST_MADE), (1, None)
        check_within("dataset", self, num_samples=made, context_words=(10, None), num_depths=at_least_1, digits=(1, 18))
        if self.filler is not None and len(self._sentences) < 2:
            raise DataError(f"{self.filler} holds {len(self._sentences)} sentences; a haystack needs at least 2")

    @cached_property
    def _sentences(self) -> list[str]:
        if self.filler is None:
            return []
        path = Path(self.filler).expanduser()
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        texts = [read_text(file, "text", f"dataset.filler {self.filler}", "filler") for file in files]
        parts = (part for text in texts for part in _SENTENCE_END.split(without_marks(text)))
        return [" ".join(part.split()) for part in parts if part.strip()]

    @cached_property
    def fingerprint(self) -> str:
        """The version of the generator and the filler's content; everything else is in the settings."""
        content = hashlib.sha256("\n".join(self._sentences).encode()).hexdigest() if self.filler else "synthetic"
        return f"needles-v{_VERSION}-{content}"

    def examples(self) -> Sequence[Example]:
        """Return the examples; example k has depth k modulo num_depths."""
        return self._examples

    @cached_property
    def _examples(self) -> list[Example]:
        return [self._haystack(number) for number in range(self.num_samples)]

    def _haystack(self, number: int) -> Example:
        rng = random.Random(f"needles-v{_VERSION}/{self.seed}/{number}")
        depth = (number % self.num_depths) / max(1, self.num_depths - 1)
        secret = str(rng.randrange(10 ** (self.digits - 1), 10**self.digits))
        hidden, asked = _NEEDLES[self.kind]
        hay = self._hay(rng)
        hay.insert(round(depth * len(hay)), hidden.format(secret))
        name = f"{self.kind}/{number}/depth-{depth:.2f}"
        return Example(
            id=name,
            cluster=name,
            context=" ".join(hay) + "\n\n",
            question=asked,
            reference=secret,
            facts=frozenset((secret,)),
            fact_noun="needles",
        )

    def _hay(self, rng: random.Random) -> list[str]:
        """Return sentences of `context_words` words or a few more, from a random place in the filler on."""
        hay: list[str] = []
        num_words, at = 0, rng.randrange(len(self._sentences)) if self._sentences else 0
        while num_words < self.context_words:
            hay.append(self._sentences[at % len(self._sentences)] if self._sentences else _filler_sentence(rng))
            num_words, at = num_words + len(hay[-1].split()), at + 1
        return hay

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return every hidden number of the data set that `text` holds as a number of its own."""
        numbers = set(_NUMBER.findall(text))
        return frozenset(example.reference for example in self._examples if example.reference in numbers)


# 2: a value is several words. The first token of an answer comes from the prompt's own forward, before any cut, so a
# value of one token (version 1) is found by every policy that is shown the question.
_RECALL_VERSION = 2
_STATED = "Here is {}'s {} {}."
_FIRST_VALUE = re.compile(r"\W*(\w+ \w+)")
# A value stands right after its key, and each fits after every key: what a small model can do.
_OWNERS = (
    *("Anna", "Bruno", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene"),
    *("Jacob", "Karen", "Louis", "Maria", "Nathan", "Olivia", "Peter", "Rachel", "Simon"),
)
_COLOURS = (
    *("amber", "black", "blue", "brown", "crimson", "golden", "green", "grey", "ivory"),
    *("lilac", "orange", "pink", "purple", "red", "silver", "violet", "white", "yellow"),
)
_THINGS = (
    *("anchor", "basket", "bottle", "button", "candle", "carpet", "chair", "clock", "drum"),
    *("feather", "hammer", "kettle", "ladder", "lantern", "mirror", "needle", "pillow", "ribbon"),
)
_MATERIALS = (
    *("bamboo", "brass", "clay", "copper", "cotton", "glass", "iron", "leather", "linen"),
    *("marble", "paper", "plastic", "rubber", "silk", "steel", "stone", "straw", "wool"),
)


@dataclass(frozen=True, kw_only=True)
class Recall:
    """`num_samples` texts of `num_keys` things, each somebody's and of its own colour, which begin to state one again.

    "Here is Anna's red" goes on with what it was, "silk ribbon": a text to be completed, without chat template, so that
    a model that was never taught to answer can do it. Only what comes after the first token is read from a cache that
    was cut. The question is that last begin; hidden, the text before it is compressed alone. Which
    thing is asked for steps through the places, so that every depth comes equally often; the id holds it.
    filler_words: after each thing, at least. Raises: ConfigError.
    """

    num_samples: int = 20
    num_keys: int = 8
    filler_words: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        check_within(
            "dataset", self, num_samples=(1, MOST_MADE), num_keys=(1, len(_THINGS)), filler_words=(0, MOST_MADE)
        )

    @property
    def fingerprint(self) -> str:
        """The version of the generator; everything else is in the settings."""
        return f"recall-v{_RECALL_VERSION}"

    def examples(self) -> Sequence[Example]:
        """Return the examples; example k asks for the thing at place k modulo num_keys."""
        return self._examples

    @cached_property
    def _examples(self) -> list[Example]:
        return [self._text(number) for number in range(self.num_samples)]

    def _text(self, number: int) -> Example:
        rng = random.Random(f"recall-v{_RECALL_VERSION}/{self.seed}/{number}")
        place = number % self.num_keys
        owners, colours = (rng.sample(words, self.num_keys) for words in (_OWNERS, _COLOURS))
        materials, things = (rng.sample(words, self.num_keys) for words in (_MATERIALS, _THINGS))
        values = [f"{material} {thing}" for material, thing in zip(materials, things, strict=True)]
        sentences: list[str] = []
        for stated in zip(owners, colours, values, strict=True):
            sentences.append(_STATED.format(*stated))
            num_words = 0
            while num_words < self.filler_words:
                sentences.append(_filler_sentence(rng))
                num_words += len(sentences[-1].split())
        name = f"recall/{number}/depth-{place / max(1, self.num_keys - 1):.2f}"
        return Example(
            id=name,
            cluster=name,
            context=" ".join(sentences) + " ",
            question=_STATED.format(owners[place], colours[place], "").removesuffix(" ."),
            reference=values[place],
            facts=frozenset((values[place],)),
            fact_noun="needles",
            completes=True,
        )

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return the two words that `text` begins with: the text goes on, and that is no answer."""
        value = _FIRST_VALUE.match(text)
        return frozenset(value.groups()) if value else frozenset()

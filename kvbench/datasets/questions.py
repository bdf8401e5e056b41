r"""Published sets of questions: one about a picture, one with follow-ups, one with a final answer to compare.

LLaVA-Bench has JSON lines, a question `{"question_id", "image", "text"}`, and in a file of their own the answers
`{"question_id", "text"}`. The form that holds both, `{"id", "image", "instruction", "output"}` (the 30 x 3 COCO
file), is read too; its ids name pictures, so an item is named by its number.

MM-Vet (arXiv 2308.02490) is `mm-vet.json`, an object keyed by question id, and a folder of pictures. An answer may
list alternatives (`<OR>`), each of required parts (`<AND>`). The reference is the first alternative, its parts joined
by ", ". MM-Vet's own score asks GPT-4 and is not computed here.

`Conversation` and `MTBench` have questions with follow-ups. Of pictures (the Elastic Cache release's form, LLaVA's
conversations) an item is `{"image": ..., "question": ..., "answer": ...}`, or `{"image": ..., "conversations":
[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}` (LLaVA's training files,
LLaVA-Description / detail_1k), whose later pairs become follow-up questions. LLaVA's `id` names a
picture and repeats, so an item is named by its number.

Of MT-Bench (arXiv 2306.05685; Vicuna's have one turn) it is `{"question_id", "turns": [text, ...]}`; references are
in the row (`reference`) or in FastChat's answer files (`choices[0].turns`). Most turns have none: their answers are
compared with the full cache's only. MT-Bench's own score asks a model to judge and is not computed here.

`Problems` have one final answer (GSM8K, MATH-500 and AIME files): an answer is right if it ends at the same. Whole
numbers are compared here, exactly, with nothing to install. Expressions are compared by math-verify (extra `math`),
which knows that \frac12 is 0.5. Which of the two compares is a setting of the data set, never a question of what is
installed: the same cell gives the same number everywhere.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from kvbench.datasets.base import Example, Fields, Turn, checked_text
from kvbench.datasets.files import (
    FileDataset,
    Row,
    answer_for,
    answers_by_id,
    existing,
    item_row,
    picture_at,
    read_items,
    read_json,
    read_rows,
    texts_by_id,
)
from kvbench.errors import ConfigError, DataError, close_matches


@dataclass(frozen=True, kw_only=True)
class LlavaBench(FileDataset):
    """Examples of a question file, clustered by picture.

    images: folder of the pictures, by default the file's own. image_prefix: put before every picture's
    name (`COCO_val2014_` where the questions leave it out). answers: JSON lines of reference answers;
    without it there is no reference, and answers are compared with the full cache's only.
    """

    images: str | None = None
    image_prefix: str = ""
    answers: str | None = None

    @cached_property
    def _references(self) -> Mapping[str, Mapping[str, Any]] | None:
        return answers_by_id(self.answers) if self.answers else None

    def _example(self, row: Row) -> Example:
        fields = row.fields("question_id", "image", "text")
        folder = Path(self.images or Path(self.path).parent).expanduser()
        picture = self.image_prefix + fields.text("image")
        if "instruction" in fields.content:
            name, question, reference = str(row.number), fields.text("instruction"), fields.text("output")
        else:
            name, question, reference = fields.id("question_id", default=row.number), fields.text("text"), ""
            if self._references is not None:
                answer = answer_for(name, self._references, row.where, str(self.answers))
                reference = Fields(answer, f"the answer to {row.where}", ("text",)).text("text")
        return Example(
            id=name,
            cluster=picture,
            question=question,
            reference=reference,
            load_image=picture_at(picture, folder, row.where),
        )


@dataclass(frozen=True, kw_only=True)
class MMVet(FileDataset):
    """Examples of `mm-vet.json`, clustered by picture.

    images: folder of the pictures, by default `images` beside the file. answers: a JSON object id -> text
    whose texts are the references in the place of the file's own short ones (a model's responses, say).
    ids: a JSON list of question ids to keep, such as the authors' subset without people.
    """

    images: str | None = None
    answers: str | None = None
    ids: str | None = None

    @cached_property
    def _references(self) -> Mapping[str, str] | None:
        return texts_by_id(self.answers, "answers") if self.answers else None

    def _rows(self) -> Iterator[Row]:
        path = existing(self.path)
        items = Fields(read_items(path), path.name, ("an item for each question id",)).content
        names = _wanted(self.ids, items) if self.ids else list(items)
        for number, name in enumerate(names):
            yield item_row(f"{path.name}, item {name!r}", number, (name, items[name]))

    def _example(self, row: Row) -> Example:
        name, content = row.read()
        fields = Fields(content, row.where, ("imagename", "question", "answer"))
        folder = Path(self.images).expanduser() if self.images else existing(self.path).parent / "images"
        picture = fields.text("imagename")
        first, *_ = fields.text("answer").split("<OR>")
        reference = ", ".join(part.strip() for part in first.split("<AND>") if part.strip())
        if self._references:
            reference = answer_for(name, self._references, row.where, str(self.answers))
        return Example(
            id=checked_text(name, "id", row.where),
            cluster=picture,
            question=fields.text("question"),
            reference=checked_text(reference, "answer", row.where),
            load_image=picture_at(picture, folder, row.where),
        )


def _wanted(source: str, items: Mapping[str, object]) -> list[str]:
    path = existing(source, "ids")
    names = read_json(path, "ids")
    if not isinstance(names, list) or not names:
        raise DataError(f"{path} holds {str(names)[:60]!r}; dataset.ids must be a JSON list of question ids")
    unknown = [name for name in names if not isinstance(name, str) or name not in items]
    if unknown:
        raise DataError(f"{path} names the question {str(unknown[0])[:60]!r}, which the data set does not have")
    return [name for name in items if name in set(names)]


_IMAGE_MARK = "<image>"
_SPEAKERS = ("human", "gpt")


@dataclass(frozen=True, kw_only=True)
class Conversation(FileDataset):
    """Examples of a JSON or JSONL file. `images`: folder of the pictures, by default the file's own."""

    images: str | None = None

    def _example(self, row: Row) -> Example:
        fields = row.fields("question", "answer")
        if "conversations" in fields.content:
            first, *later = _conversations(fields)
        else:
            first, later = Turn(question=_said(fields, "question"), answer=_said(fields, "answer")), []
        picture = fields.content.get("image")
        folder = Path(self.images or Path(self.path).parent).expanduser()
        return Example(
            id=f"{row.number}",
            cluster=str(picture) if picture else f"{row.number}",
            question=first.question,
            reference=first.answer,
            load_image=picture_at(picture, folder, row.where) if picture else None,
            follow_ups=tuple(later),
        )


def _conversations(fields: Fields) -> list[Turn]:
    said = fields.content["conversations"]
    if not isinstance(said, list) or not said or len(said) % 2:
        raise DataError(
            f"{fields.where} has the conversations {str(said)[:80]!r}; it must be a list of human, gpt pairs"
        )
    values = []
    for number, content in enumerate(said):
        speaker, where = _SPEAKERS[number % 2], f"{fields.where}, conversations {number}"
        part = Fields(content, where, ("from", "value"))
        if part.content.get("from") != speaker:
            raise DataError(f"{where} is from {str(part.content.get('from'))[:40]!r}; it must be from {speaker!r}")
        values.append(_said(part, "value"))
    return [Turn(question=q, answer=a) for q, a in zip(values[::2], values[1::2], strict=True)]


def _said(fields: Fields, name: str) -> str:
    text = fields.text(name).replace(_IMAGE_MARK, "").strip()
    if not text:
        raise DataError(f"{fields.where} has an empty {name}: it holds {_IMAGE_MARK} alone; every item needs one")
    return text


@dataclass(frozen=True, kw_only=True)
class MTBench(FileDataset):
    """Examples of a question file; later turns are follow-up questions.

    answers: JSON lines of reference answers. only_with_reference: leave the questions without one aside (all
    but math, reasoning and coding), as perplexity needs references; num_samples counts what is left.
    """

    answers: str | None = None
    only_with_reference: bool = False

    @cached_property
    def _references(self) -> Mapping[str, Mapping[str, Any]]:
        return answers_by_id(self.answers) if self.answers else {}

    def _rows(self) -> Iterator[Row]:
        for row in read_rows(self.path):
            if not self.only_with_reference or row.problem is not None or self._has_reference(row.content):
                yield row

    def _has_reference(self, content: Any) -> bool:
        """Return True also for a row of the wrong form, which is told by its own message."""
        if not isinstance(content, dict) or str(content.get("question_id")) in self._references:
            return True
        own = content.get("reference")
        return own[0] != "" if isinstance(own, list) and own else bool(own)

    def _example(self, row: Row) -> Example:
        fields = row.fields("question_id", "turns")
        name = fields.id("question_id", default=row.number)
        questions = _texts(fields.content.get("turns"), "turns", row.where)
        answers = self._answers(name, fields) or [""] * len(questions)
        if len(answers) != len(questions):
            raise DataError(f"{row.where} has {len(questions)} turns, but {len(answers)} reference answers")
        first, *later = (Turn(question=q, answer=a) for q, a in zip(questions, answers, strict=True))
        return Example(id=name, cluster=name, question=first.question, reference=first.answer, follow_ups=tuple(later))

    def _answers(self, name: str, fields: Fields) -> list[str]:
        if name in self._references:
            choices = self._references[name].get("choices")
            if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
                raise DataError(f"the answer to {fields.where} has no choices; give FastChat's reference_answer file")
            return _texts(choices[0].get("turns"), "choices[0].turns", f"the answer to {fields.where}")
        own = fields.content.get("reference")
        return _texts(own, "reference", fields.where, may_be_empty=True) if own else []


def _texts(value: Any, name: str, where: str, *, may_be_empty: bool = False) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where} has the {name} {str(value)[:80]!r}; it must be a list of texts")
    return [checked_text(text, name, where) if text.strip() or not may_be_empty else "" for text in value]


Kind = Literal["whole_number", "expression"]
_VERSION = 1  # of the rules below
_CHECKER = "math-verify"
_CHECK_S = 5  # math-verify gives an expression up after so long, and calls it wrong
_MARK = "####"
_BOX = "\\boxed{"
_ANNOTATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calls of a calculator
_BRACE = re.compile(r"\\boxed\{|\\[{}]|[{}]")
_NUMBER = re.compile(r"(?:(?<![\w)}])-)?(?:\d{1,3}(?:(?:,\\!|\{,\}|\\,|,)\d{3})+|\d+)(?:\.\d+)?")
_NO_DIGIT = re.compile(r"[{},\\!]")
_WHOLE = re.compile(r"(?P<sign>-?)(?P<digits>\d+)(?:\.0*)?")


@dataclass(frozen=True, kw_only=True)
class Problems(FileDataset):
    """Examples of a file of problems, each its own cluster.

    question, answer, solution: names of the fields; `answer` holds the final answer, after "####" if that is in it
    (GSM8K), and `solution` the way to it, which is then the reference; null: the answer field is. kind: what a final
    answer is and so how it is compared. instruction: stands after every problem, which may be empty. The id is the
    row's `unique_id`, `id` or `ID`, else its number. Raises: ConfigError where math-verify is needed and not there.
    """

    kind: Kind = "whole_number"
    question: str = "question"
    answer: str = "answer"
    solution: str | None = None
    instruction: str = ""

    def _check_settings(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"dataset.kind is {self.kind!r}; {close_matches(self.kind, get_args(Kind))}")
        if self.kind == "expression":
            _checker_version()

    def _example(self, row: Row) -> Example:
        fields = row.fields(self.question, self.answer)
        name = fields.id("unique_id", "id", "ID", default=row.number)
        given = _text_or_number(fields, self.answer)
        final = given.rpartition(_MARK)[2].strip()
        if self.kind == "whole_number" and _whole_number(final) is None:
            raise DataError(
                f"{row.where} has the {self.answer} {final[:80]!r}; it must be, or end in {_MARK} and, a whole number "
                "(dataset.kind=expression compares anything else)"
            )
        asked, instruction = fields.text(self.question), self.instruction.strip()
        solution = fields.text(self.solution) if self.solution is not None else given
        return Example(
            id=name,
            cluster=name,
            question=f"{asked}\n\n{instruction}" if instruction else asked,
            reference=_ANNOTATION.sub("", solution),
            one_answer=True,
            is_right=partial(_RIGHT[self.kind], final),
        )

    @cached_property
    def fingerprint(self) -> str:
        """That of what is asked and of the solutions, with the final answers and the rules that compare them."""
        finals = [example.is_right.args[0] for example in self.examples() if isinstance(example.is_right, partial)]
        rules = [_VERSION, self.kind, _checker_version() if self.kind == "expression" else None]
        return hashlib.sha256(json.dumps([super().fingerprint, finals, rules]).encode()).hexdigest()


def _text_or_number(fields: Fields, name: str) -> str:
    found = fields.content.get(name)
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    if isinstance(found, float) and found.is_integer():  # a table's column of numbers
        return str(int(found))
    return checked_text(found, name, fields.where) if isinstance(found, str) else fields.text(name)


def same_whole_number(final: str, text: str) -> bool:
    r"""Tell whether the final answer of `text` is the whole number `final`; commas, units and "72.00" do not matter.

    The final answer stands in the last \boxed{}, else in the line of the first "####" (what a model writes after it is
    the next problem), else it is the last number of the text. A box or such a line that holds two numbers, as 1/2
    does, holds no whole one.
    """
    marked = _last_box(text)
    if marked is None and _MARK in text:
        marked = text.partition(_MARK)[2].strip().partition("\n")[0]
    if marked is not None:
        return _whole_number(marked) == _whole_number(final)
    numbers = _numbers(text)
    return bool(numbers) and _whole_number(numbers[-1]) == _whole_number(final)


def _whole_number(text: str) -> str | None:
    """Return the one number that `text` holds, None where there is none, another one too, or it is not whole.

    Its digits as text: a model may write thousands of them, of which Python makes no number.
    """
    numbers = _numbers(text)
    found = _WHOLE.fullmatch(_NO_DIGIT.sub("", numbers[0])) if len(numbers) == 1 else None
    if found is None:
        return None
    digits = found["digits"].lstrip("0")
    return f"{found['sign']}{digits}" if digits else "0"


def _numbers(text: str) -> list[str]:
    return _NUMBER.findall(text.replace("\u2212", "-"))


def _last_box(text: str) -> str | None:
    r"""Return what is inside of the last \boxed{} that is closed, None if there is none."""
    opened: list[re.Match[str]] = []
    last, begin = None, -1
    for brace in _BRACE.finditer(text):
        if brace[0] == "}" and opened:
            first = opened.pop()
            if first[0] == _BOX and first.start() > begin:
                last, begin = text[first.end() : brace.start()], first.start()
        elif brace[0] in ("{", _BOX):
            opened.append(brace)
    return last


def same_expression(final: str, text: str) -> bool:
    """Tell whether math-verify finds in `text` what equals the expression `final`. What it cannot read is wrong."""
    library, limit = _checker(), _seconds()
    found = library.parse(text, parsing_timeout=limit)
    return bool(library.verify(_parsed(final), found, timeout_seconds=limit))


@cache
def _parsed(final: str) -> Any:
    return _checker().parse(f"{_BOX}{final}}}", parsing_timeout=_seconds())


def _seconds() -> int | None:
    """Return the limit of math-verify, which it keeps by a signal: in the main thread only."""
    return _CHECK_S if threading.current_thread() is threading.main_thread() else None


def _checker() -> Any:
    return importlib.import_module("math_verify")


def _checker_version() -> str:
    try:
        return f"{_CHECKER} {version(_CHECKER)}"
    except PackageNotFoundError as error:
        raise ConfigError(
            f"dataset.kind is 'expression', which is compared by the package {_CHECKER}; pip install 'kvbench[math]'"
        ) from error


_RIGHT = {"whole_number": same_whole_number, "expression": same_expression}

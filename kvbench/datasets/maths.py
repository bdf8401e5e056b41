r"""Problems with one final answer, GSM8K, MATH-500 and AIME files: an answer is right if it ends at the same.

Whole numbers are compared here, exactly, with nothing to install. Expressions are compared by math-verify (extra
`math`), which knows that \frac12 is 0.5. Which of the two compares is a setting of the data set, never a question of
what is installed: the same cell gives the same number everywhere.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import threading
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

from kvbench.datasets.base import Example, Fields, checked_text
from kvbench.datasets.files import FileDataset, Row
from kvbench.errors import ConfigError, DataError, close_matches

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

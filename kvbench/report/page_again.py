"""The page's account of itself: which folders, what was chosen among them, and how to make it again."""

from __future__ import annotations

import shlex

from kvbench.report.comparison import DECLARED, Choices
from kvbench.report.load import Choice, Results
from kvbench.report.page_markup import escaped

_MOST_CHOICES = 50


def again_html(results: Results, choices: Choices = DECLARED) -> str:
    """Return commands and, where several folders were read, which one each shared cell was taken from."""
    folders = " ".join(shlex.quote(name or "FOLDER") for name in results.folders)
    folders += _options(results, choices)
    return f"""<p>The same records give the same page, byte for byte:</p>
<pre>kvbench report {escaped(folders)}
kvbench report {escaped(folders)} --format csv
kvbench report {escaped(folders)} --format latex --out table.tex
kvbench results show {escaped(shlex.quote(results.folders[0] or "FOLDER"))} KEY</pre>
<p>The last line shows the settings and the software of one cell; running a sweep again measures only cells that are
missing. All numbers lie in <code>table.csv</code> and <code>table.parquet</code>, every sample in
<code>samples.csv</code> and <code>samples.parquet</code>.</p>{_choices(results)}"""


def _options(results: Results, choices: Choices) -> str:
    """Return the options without which the page would be another one."""
    words = [] if results.sweep is None else [f"--sweep={results.sweep}"]
    words += [f"--margin={name}={value!r}" for name, value in sorted(choices.margins.items())]
    words += ["--intersect"] if choices.intersect else []
    return "".join(f" {shlex.quote(word)}" for word in words)


def _choices(results: Results) -> str:
    if len(results.folders) < 2:
        return ""
    counts = [(name, sum(cell.folder == name for cell in results.records)) for name in results.folders]
    read = ", ".join(f"{count} from <code>{escaped(name)}</code>" for name, count in counts)
    items = "".join(f"<li>{_choice(results, choice)}</li>" for choice in results.choices[:_MOST_CHOICES])
    more = f"<p>And {len(results.choices) - _MOST_CHOICES} more.</p>" if len(results.choices) > _MOST_CHOICES else ""
    shared = (
        f"<p>Cells in more than one folder: the newest that did not fail counts.</p><ul>{items}</ul>" if items else ""
    )
    return f"<p>Cells shown: {read}.</p>{shared}{more}"


def _choice(results: Results, choice: Choice) -> str:
    labels = {cell.key: f"{cell.policy}, {cell.budget}" for cell in results.records}
    others = ", ".join(
        f"{_code(folder)} ({escaped(status)}, {escaped(start[:19])})" for folder, status, start in choice.others
    )
    name = escaped(labels.get(choice.key, choice.key[:16]))
    return f"{name}: taken from {_code(choice.folder)}, not from {others}"


def _code(text: str) -> str:
    return f"<code>{escaped(text)}</code>"

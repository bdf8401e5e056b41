"""Documents to summarise: multi_news, XSum, CNN/DailyMail and any table with a document and a summary.

The document comes first and the instruction after it, so that the instruction can be hidden from a
policy that compresses the document.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.datasets.base import Example
from kvbench.datasets.fields import id_of, object_of, text_of
from kvbench.datasets.file_dataset import FileDataset
from kvbench.datasets.rows import Row


@dataclass(frozen=True, kw_only=True)
class Summaries(FileDataset):
    """Examples of a JSON, JSONL, CSV or Parquet file, or of the hub, each document a cluster.

    document, summary: names of the fields. instruction: what stands after the document; empty where the
    document is a whole prompt already. The id is the row's `id`, else its number.
    """

    document: str = "document"
    summary: str = "summary"
    instruction: str = "Summarize the text above in a few sentences."

    def _example(self, row: Row) -> Example:
        content = object_of(row.content, row.where, (self.document, self.summary))
        name = id_of(content, ("id",), str(row.number), row.where)
        document = text_of(content, self.document, row.where)
        instruction = self.instruction.strip()
        return Example(
            id=name,
            cluster=name,
            context=f"{document}\n\n" if instruction else "",
            question=instruction or document,
            reference=text_of(content, self.summary, row.where),
        )

"""`kvbench results wandb`: send records to Weights & Biases again, whatever became of the first attempt."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvbench.errors import ConfigError
from kvbench.records import read_record
from kvbench.sinks.base import SinkGroup
from kvbench.sinks.store import RecordStore
from kvbench.sinks.wandb import WandbSink


def send_to_wandb(args: argparse.Namespace, keys: list[str]) -> None:
    """Make one run of each cell in `keys`; a run's id is its cell's key, so a second upload adds no second run.

    Raises: ConfigError for a wrong mode, or mode=online without a key.
    """
    if not keys:
        raise ConfigError("no record is left to send; kvbench results list shows what there is")
    store = RecordStore(args.folder)
    mirror = WandbSink(project=args.project, entity=args.entity, mode=args.mode, folder=args.to or Path(args.folder))
    sinks = SinkGroup([mirror])
    sinks.open("", len(keys))  # no name: each run keeps the sweep of its record
    for key in keys:
        sinks.record(read_record(store.cell_folder(key) / "record.json"))
    sinks.close()

"""Keep notices about optional packages out of the progress bars; errors still show."""

from __future__ import annotations

import logging
import os

from tqdm import tqdm


def quiet_libraries() -> None:
    """Set what libraries read when they are imported; what the user has set stays.

    tqdm's monitor is a thread that wakes up to redraw bars, also beside what is timed.
    """
    tqdm.monitor_interval = 0
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # a class that is not found is told in one line
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

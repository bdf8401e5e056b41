"""The command line: a command a module, and how all of them read their words."""

from __future__ import annotations

import argparse
from typing import NoReturn

from kvbench.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser to which a mistake is one line and exit code 2, not a usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's sentence."""
        raise ConfigError(f"{message}; {self.prog} --help lists flags and settings")

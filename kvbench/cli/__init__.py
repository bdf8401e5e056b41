"""The command line: the commands by what a user does, and how all of them read their words."""

from __future__ import annotations

import argparse
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NoReturn

from kvbench.errors import ConfigError, check_known


def names_in(group: str, config_dir: str | None = None) -> list[str]:
    """Return the names to choose from in a group of configurations, those of a folder of one's own too."""
    folders: list[Traversable] = [files("kvbench.conf") / group, *([Path(config_dir) / group] if config_dir else [])]
    found = (entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir())
    return sorted({name.removesuffix(".yaml") for name in found if name.endswith(".yaml")})


class Parser(argparse.ArgumentParser):
    """An ArgumentParser to which a mistake is one line and exit code 2, not a usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's sentence."""
        raise ConfigError(f"{message}; {self.prog} --help lists flags and settings")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise ConfigError with close matches for a word that is none of a flag's or the commands."""
        name = (
            action.option_strings[0] if action.option_strings else f"the {str(action.metavar or action.dest).lower()}"
        )
        if action.choices is not None:
            check_known(name, str(value), map(str, action.choices))

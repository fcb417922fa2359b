"""The `deftcore` command."""

from deftcore.cli.main import main

__all__ = ["main"]

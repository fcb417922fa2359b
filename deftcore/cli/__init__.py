"""The `deftcore` command: one file per subcommand. Heavy packages are imported where a command runs."""

from deftcore.cli.main import main

__all__ = ["main"]

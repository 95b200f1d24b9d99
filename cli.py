"""The command line: `python cli.py VIDEO "QUESTION"` in a clone, `videoxl ask VIDEO "QUESTION"` where installed."""

import sys
from importlib import import_module
from pathlib import Path

# What may come first, and who takes what follows. Anything else is a video to be asked about.
COMMANDS = {"ask": "shell.ask", "batch": "shell.batch", "convert": "hub.convert", "upload": "hub.upload"}


def main(arguments: list[str] | None = None) -> int:
    """Runs what the first argument names; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = next((name for name in arguments[:1] if name in COMMANDS), None)
    name = Path(sys.argv[0]).name.removesuffix(".exe")
    name = f"python {name}" if name.endswith(".py") else name
    module = import_module(f"videoxl.{COMMANDS[command or 'ask']}")
    return module.main(arguments[1:] if command else arguments, f"{name} {command}" if command else name)


if __name__ == "__main__":
    sys.exit(main())

"""The entry point of `resblock-bench` and of `python -m resblock_bench.bench`."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Ctrl-C while the command line itself is imported ends as it does later."""
    try:
        from .cli.main import main as command_line
    except KeyboardInterrupt:
        print("resblock-bench: interrupted: nothing was begun", file=sys.stderr)
        sys.exit(3)
    command_line()


if __name__ == "__main__":
    main()

"""`python -m loadtest`: the verb alone, on a machine that has nothing else."""

from __future__ import annotations

import argparse
import sys

from loadtest.command import add_options


def main() -> None:
    parser = argparse.ArgumentParser("loadtest")
    add_options(parser)
    options = parser.parse_args()
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"loadtest: {error}")


if __name__ == "__main__":
    main()

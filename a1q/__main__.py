"""`python -m a1q` and the `a1q` command. Ctrl-C while everything else is still being imported ends quietly too."""

import sys


def main() -> None:
    """Run the command line; exits with the code that `a1q.errors` documents."""
    try:
        from a1q.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

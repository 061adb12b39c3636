"""`python -m a1q` is the `a1q` command."""

from a1q.cli import main

if __name__ == "__main__":
    main()

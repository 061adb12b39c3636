"""a1q: declarative recipes that make language models small enough for the Apple Neural Engine."""

__version__ = "0.1.0"

"""Sentences by number, for texts in tests."""

SUBJECTS = (
    "lock",
    "queue",
    "socket",
    "window",
    "matrix",
    "parser",
    "stream",
    "buffer",
    "clock",
    "thread",
    "token",
    "header",
)
VERBS = ("opens", "closes", "flushes", "copies", "measures", "reverses", "checks", "sorts")


def sentence(number: int) -> str:
    """A sentence of its own: no two numbers share six words in a row."""
    one, two = SUBJECTS[number % len(SUBJECTS)], SUBJECTS[(number // 3) % len(SUBJECTS)]
    verb = VERBS[(number // 2) % len(VERBS)]
    return f"Case {number} {verb} the {one} of number {number} before any other {two} of group {number} is seen."

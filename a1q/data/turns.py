"""Where answers stand among a conversation's tokens, found by the tokens that a chat template puts around them.

What a template writes around contents is learned from two conversations whose contents are unmistakable. Where it
begins answers with a special token, what that token and its followers open and another special token closes is an
answer, and one look over the tokens finds all of them. Wherever that can't be relied on, `None` says so, and
`a1q.data.chat` asks the template about every answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from a1q.errors import StageError

if TYPE_CHECKING:
    import numpy
    from tokenizers import Tokenizer

SAID = ("Qaxzu", "Wopki", "Zubra", "Yalmo")
"""Contents of the conversations that a template is asked about."""
Render = Callable[[Sequence[Mapping[str, str]]], str]


@dataclass(frozen=True)
class Turns:
    """What stands around an answer, in tokens."""

    opening: numpy.ndarray
    """Of every answer: from the last special token before it on."""
    more: int
    """Tokens of the prompt that follow `opening` before the last answer, such as those of an empty thought."""
    end: int
    """The special token that ends an answer's turn."""
    closing: str
    """That token's text."""

    def said(
        self, talks: Sequence[Sequence[Mapping[str, str]]], ids: numpy.ndarray, bounds: numpy.ndarray
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Find what an assistant said, ends of turns included, in the tokens of several conversations at once.

        Args:
            talks: the r conversations; of an empty one nothing is looked for.
            ids: integers [n], their tokens one behind the other.
            bounds: integers [r + 1], where each begins, and n.

        Returns:
            bool [n], and bool [r]: of which conversations it is sure. Of others nothing is marked.
        """
        import numpy

        size = len(self.opening)
        places = numpy.flatnonzero(ids[: len(ids) - size + 1] == self.opening[0])
        for offset in range(1, size):
            places = places[ids[places + offset] == self.opening[offset]]
        owner = numpy.searchsorted(bounds, places, side="right") - 1
        wanted = numpy.array([self._answers(talk) for talk in talks])
        sure = numpy.bincount(owner, minlength=len(talks)) == wanted
        last = numpy.append(owner[1:] != owner[:-1], True)[: len(owner)]
        begins = places + size
        if self.more:
            answered = numpy.array([bool(talk) and talk[-1]["role"] == "assistant" for talk in talks], dtype=bool)
            begins = begins + self.more * (last & answered[owner])
        ends = numpy.append(numpy.flatnonzero(ids == self.end), len(ids))
        ends = ends[numpy.searchsorted(ends, begins)]
        sure[owner[ends >= bounds[owner + 1]]] = False
        kept = sure[owner]
        steps = numpy.zeros(len(ids) + 1, dtype=numpy.int32)
        steps[begins[kept]] += 1
        steps[ends[kept] + 1] -= 1
        return numpy.cumsum(steps[:-1]) > 0, sure

    def _answers(self, talk: Sequence[Mapping[str, str]]) -> int:
        """How many there are; -1, so never as many as are found, where one holds what ends a turn."""
        answers = [message["content"] for message in talk if message["role"] == "assistant"]
        return -1 if any(self.closing in answer for answer in answers) else len(answers)


def learn(render: Render, prompt: Render, tokenizer: Tokenizer, special: Sequence[str]) -> Turns | None:
    """What `render` writes around answers, None if that isn't as simple as `Turns`.

    Args:
        render: as conversations are rendered.
        prompt: as answers are prompted for; what it writes before an answer is not said by the assistant.
        special: texts of the special tokens.
    """
    import numpy

    roles = ("user", "assistant", "user", "assistant")
    talk = [{"role": role, "content": content} for role, content in zip(roles, SAID, strict=True)]
    try:
        text, asked = render(talk), prompt(talk[:3])
    except StageError:
        return None
    gaps = _between(text, SAID)
    before = _between(asked, SAID[:3])
    if gaps is None or before is None:
        return None
    first, last, lead, tail = gaps[1], gaps[3], before[3], gaps[4]
    closing = next((token for token in special if tail.startswith(token)), "")
    if not closing or not gaps[2].startswith(closing):
        return None
    if not last.startswith(lead) or not lead.startswith(first):
        return None  # another beginning than an answer gets when it is prompted for
    cut = max((first.rfind(token) for token in special), default=-1)
    if cut < 0:
        return None

    def tokens(piece: str) -> list[int]:
        return tokenizer.encode(piece, add_special_tokens=False).ids

    opening, prompted = tokens(first[cut:]), tokens(lead[cut:])
    end = tokenizer.token_to_id(closing)
    if prompted[: len(opening)] != opening or end is None or end in prompted[len(opening) :]:
        return None
    probe = [*tokens(first[cut:] + SAID[1])]
    if probe[: len(opening)] != opening:
        return None
    return Turns(numpy.array(opening, dtype=numpy.int64), len(prompted) - len(opening), end, closing)


def _between(text: str, contents: Sequence[str]) -> list[str] | None:
    """What stands before, between and behind the contents, None unless each is there once and in order."""
    found, rest = [], text
    for content in contents:
        before, met, rest = rest.partition(content)
        if not met or content in rest:
            return None
        found.append(before)
    return [*found, rest]

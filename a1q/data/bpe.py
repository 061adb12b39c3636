"""Train a byte-level BPE tokenizer and write the files that `transformers` expects beside a model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

END, START_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, START_TURN, END_TURN)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab: int, context: int, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json to `folder`.

    The special tokens are Qwen3's: id 0 ends a text, 1 and 2 begin and end a turn of a conversation.

    Args:
        vocab: number of tokens in all; fewer come out if the text is too small.
        context: longest input that the tokenizer's config declares.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": END,
            "additional_special_tokens": [START_TURN, END_TURN],
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write(
        folder / "generation_config.json",
        {"eos_token_id": [SPECIAL.index(END), SPECIAL.index(END_TURN)], "pad_token_id": SPECIAL.index(END)},
    )


def token_bytes(folder: Path) -> list[int]:
    """How many bytes of text each token of such a tokenizer stands for; 0 for special ones."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    # In byte-level BPE one character of a token's name is one byte.
    return [0 if number in special else len(tokenizer.id_to_token(number) or "") for number in range(size)]


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

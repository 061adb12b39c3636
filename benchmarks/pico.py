"""What the built-in model is worth: `python -m benchmarks.pico [MODEL]` prints a table and a few samples.

Losses are nats per token on the test side of the built-in text, none of which the model was trained on.
`unigram` is the cross-entropy of a model that knows the train side's token counts alone.
"""

from __future__ import annotations

import math
import sys

from benchmarks.common import print_table, save

SEQ_LEN, SEQUENCES = 128, 512
PROMPTS = ("Return the", "If the file does not exist,", "This class represents", "The default value")


def main(source: str) -> None:
    """Print the table for one model source."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from a1q.data import token_sequences
    from a1q.data.bpe import token_bytes
    from a1q.models.source import resolve_source
    from a1q.models.view import read_view
    from a1q.stages.pretrain import mean_loss, unigram_entropy

    folder = resolve_source(source).path
    view = read_view(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{source}: {view.parameters:,} parameters, {size / 1e6:.1f} MB")
    rows = []
    lengths = torch.tensor(token_bytes(folder))
    for text in ("builtin:prose", "builtin:prose-all"):
        entry = {"source": text}
        train = token_sequences(entry, folder, "train", SEQ_LEN, None, 0)
        test = token_sequences(entry, folder, "test", SEQ_LEN, None, 0)[:SEQUENCES]
        loss, unigram = mean_loss(model, test), unigram_entropy(train, test, view.config["vocab_size"])
        targets = torch.from_numpy(test[:, 1:]).long()
        bits = loss * targets.numel() / math.log(2) / int(lengths[targets].sum())
        rows.append(
            {
                "text": text,
                "test tokens": targets.numel(),
                "loss": round(loss, 3),
                "perplexity": round(math.exp(loss), 1),
                "unigram": round(unigram, 3),
                "below unigram": round(unigram - loss, 2),
                "bits per byte": round(bits, 2),
            }
        )
    save("pico", rows)
    print_table("Held-out loss, nats per token", list(rows[0]), [list(row.values()) for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        torch.manual_seed(0)
        out = model.generate(
            **tokenizer(prompt, return_tensors="pt"), max_new_tokens=40, do_sample=True, temperature=0.7, top_p=0.9
        )
        print("\n> " + tokenizer.decode(out[0], skip_special_tokens=True).replace("\n", "\n> "))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "builtin:pico")

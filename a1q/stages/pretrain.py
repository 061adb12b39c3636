"""`pretrain`: a small Qwen3 model and its tokenizer, trained from nothing."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.errors import StageError
from a1q.models.view import ModelView, ModuleView
from a1q.training.width import tiled

if TYPE_CHECKING:
    import numpy
    from transformers import Qwen3ForCausalLM

TEST_BATCH = 32


@dataclass(frozen=True)
class Architecture:
    """Fields of the Qwen3 config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int


@dataclass(frozen=True)
class TokenizerConfig:
    """See schemas/stages/pretrain.json."""

    vocab: int


@dataclass(frozen=True)
class Batch:
    """How much one step reads."""

    sequences: int
    accumulate: int


@dataclass(frozen=True)
class PretrainConfig:
    """See schemas/stages/pretrain.json."""

    data: str
    architecture: Architecture
    tokenizer: TokenizerConfig
    steps: int
    batch: Batch
    lr: float
    warmup: int
    schedule: str
    final_lr: float
    betas: tuple[float, float]
    weight_decay: float
    clip: float | None
    evaluate_every: int
    evaluate_sequences: int
    keep: str


class PretrainStage(Stage):
    """Tokenizer, then model, both from the train side; the test side is read once, at the end."""

    version = 2
    Config = PretrainConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """Predict the model; the only mismatch possible is between the two numbers of heads."""
        config: PretrainConfig = ctx.config
        shape = config.architecture
        if shape.num_attention_heads % shape.num_key_value_heads:
            ctx.recipe_problem(
                "architecture.num_key_value_heads",
                f"{shape.num_key_value_heads} does not divide the {shape.num_attention_heads} query heads",
            )
        if ctx.data[config.data].config.get("attention") == "document":
            ctx.recipe_problem(
                "data",
                f"data.{config.data} says `attention: document`, and pretrain reads packed text as it stands",
                "give pretrain an entry without `attention`",
            )
        view = predicted_view(shape, config.tokenizer.vocab)
        tokens = (
            config.steps * config.batch.sequences * config.batch.accumulate * _seq_len(ctx.data[config.data].config)
        )
        step_tokens = config.batch.sequences * _seq_len(ctx.data[config.data].config)
        # logits, their gradient and the softmax on the way; or the states' gradients where they are made tile by tile
        head = 3 * (shape.hidden_size if tiled(step_tokens, config.tokenizer.vocab) else config.tokenizer.vocab)
        activations = 4 * step_tokens * (head + shape.num_hidden_layers * shape.hidden_size * 40)
        return Outcome(
            view=view,
            disk_bytes=4 * view.parameters * 7,  # the model, and two checkpoints with both of Adam's moments
            memory_bytes=4 * view.parameters * 4 + activations + 500_000_000,
            notes=(f"{view.parameters:,} parameters, {tokens:,} training tokens",),
        )

    def run(self, ctx: StageContext) -> None:
        """Write a Hugging Face folder in float32.

        Metrics: `test_loss` and `unigram_entropy` in nats per token, `test_ppl`, `bits_per_byte`, and the loop's.
        `unigram_entropy` is the loss on the test side of a model that knows the train side's token counts alone.

        Raises:
            StageError: if the text is too short, or training diverges.
        """
        import torch

        from a1q.data import documents, token_sequences
        from a1q.data.bpe import train_tokenizer
        from a1q.models.checkpoint import save_model
        from a1q.training.device import prepare_torch
        from a1q.training.loop import LoopSpec, run_loop
        from a1q.training.memory import told_what_to_lower
        from a1q.training.step_loss import NextTokenLoss

        config: PretrainConfig = ctx.config
        entry = ctx.data[config.data]
        seq_len = _seq_len(entry.config)
        device = prepare_torch(ctx.runtime, ctx.seed)
        folder = ctx.scratch / "tokenizer"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        ctx.log("training the tokenizer")
        train_tokenizer(
            documents(entry.config, "train"),
            config.tokenizer.vocab,
            config.architecture.max_position_embeddings,
            folder,
        )
        train = token_sequences(entry.config, folder, "train", seq_len, None, ctx.seed)
        tune = token_sequences(entry.config, folder, "tune", seq_len, None, ctx.seed)[: config.evaluate_sequences]
        test = token_sequences(entry.config, folder, "test", seq_len, None, ctx.seed)[: config.evaluate_sequences]
        ctx.log(f"{train.size:,} tokens to train on, {len(tune)} sequences to tune, {len(test)} to test")
        asked = config.batch.sequences * config.batch.accumulate
        if asked > len(train):
            raise StageError(
                f"a step reads {config.batch.sequences} x {config.batch.accumulate} sequences, and the text has "
                f"{len(train)} of {seq_len} tokens: lower `batch.sequences` or the data's `seq_len`"
            )
        model = new_model(config.architecture, config.tokenizer.vocab, ctx.seed).to(device)
        state = dict(model.named_parameters())

        batches = Batches(train, config.batch.sequences, ctx.seed)
        next_token_loss = NextTokenLoss(model, ctx.runtime)

        def loss_of(step: int, micro: int) -> tuple[torch.Tensor, dict[str, float]]:
            tokens = torch.from_numpy(batches(step * config.batch.accumulate + micro)).long().to(device)
            return next_token_loss(tokens), {"tokens": float(tokens.numel())}

        def evaluate() -> float:
            return mean_loss(model, tune)

        hidden = config.architecture.hidden_size
        smaller = f"`architecture.hidden_size` from {hidden} to {hidden // 2}"
        with told_what_to_lower(config.batch.sequences, config.batch.accumulate, seq_len, smaller):
            result = run_loop(
                ctx,
                parameter_groups=[
                    {"name": "matrices", "params": [p for p in state.values() if p.ndim > 1], "lr": config.lr},
                    {
                        "name": "norms",
                        "params": [p for p in state.values() if p.ndim < 2],
                        "lr": config.lr,
                        "weight_decay": 0.0,
                    },
                ],
                loss_of=loss_of,
                evaluate=evaluate,
                spec=LoopSpec.of(config, ctx.seed),
                state=state,
                identity={"data": entry.digest, "vocab": config.tokenizer.vocab, "sequences": config.batch.sequences},
            )
        if result.last_loss is None:
            raise StageError("no step had a finite loss: lower the learning rate")
        ctx.metrics.update(result.metrics())
        ctx.metrics.update(test_figures(model, train, test, folder))
        save_model(model, ctx.out, tokenizer_from=folder)


def predicted_view(shape: Architecture, vocab: int) -> ModelView:
    """The model that `pretrain` makes, without torch."""
    query, key = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
    hidden, wide = shape.hidden_size, shape.intermediate_size
    linears = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    modules = {"model.embed_tokens": ModuleView("model.embed_tokens", (vocab, hidden), "embedding")}
    for layer in range(shape.num_hidden_layers):
        for suffix, size in linears.items():
            name = f"model.layers.{layer}.{suffix}"
            modules[name] = ModuleView(name, size)
    matrices = sum(math.prod(module.shape) for module in modules.values())
    norms = shape.num_hidden_layers * (2 * hidden + 2 * shape.head_dim) + hidden
    config = {**vars(shape), "model_type": "qwen3", "vocab_size": vocab, "tie_word_embeddings": True}
    return ModelView(modules, matrices + norms, {**config, "architectures": ["Qwen3ForCausalLM"]})


def new_model(shape: Architecture, vocab: int, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights, in float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        **vars(shape), vocab_size=vocab, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0
    )
    config.architectures = [Qwen3ForCausalLM.__name__]
    return Qwen3ForCausalLM(config).train()


class Batches:
    """Batches by number, a function of (sequences, size, seed, number) alone.

    Every epoch reads the text in an order of its own and cut at other places.
    """

    def __init__(self, sequences: numpy.ndarray, size: int, seed: int):
        self.flat, self.seq_len = sequences.reshape(-1), sequences.shape[1]
        self.rows = max(1, len(sequences) - 1)  # the moved cut loses one
        self.size, self.seed = size, seed
        self.starts: dict[int, numpy.ndarray] = {}

    def __call__(self, number: int) -> numpy.ndarray:
        """Batch `number`, int32 [size, seq_len]."""
        import numpy

        places = (divmod(place, self.rows) for place in range(number * self.size, (number + 1) * self.size))
        starts = [int(self._starts_of(epoch)[row]) for epoch, row in places]
        return numpy.stack([self.flat[start : start + self.seq_len] for start in starts])

    def _starts_of(self, epoch: int) -> numpy.ndarray:
        """Where the sequences of an epoch start, in its order; the last two epochs asked for are kept."""
        import numpy

        if epoch not in self.starts:
            generator = numpy.random.default_rng([self.seed, epoch])
            room = len(self.flat) - self.rows * self.seq_len
            self.starts = {old: self.starts[old] for old in list(self.starts)[-1:]}
            self.starts[epoch] = int(generator.integers(room + 1)) + generator.permutation(self.rows) * self.seq_len
        return self.starts[epoch]


def mean_loss(model: Any, sequences: numpy.ndarray) -> float:
    """Mean next-token loss over sequences int32 [n, seq_len], in nats per token."""
    import torch

    from a1q.training.step_loss import NextTokenLoss

    loss_of, total = NextTokenLoss(model), 0.0
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(sequences), TEST_BATCH):
            tokens = torch.from_numpy(sequences[start : start + TEST_BATCH]).long().to(model.device)
            total += loss_of(tokens).item() * len(tokens)
    model.train()
    return total / len(sequences)


def unigram_entropy(train: numpy.ndarray, test: numpy.ndarray, vocab: int) -> float:
    """Cross-entropy in nats of the test tokens under the train tokens' counts, each plus one."""
    import numpy

    counts = numpy.bincount(train.reshape(-1), minlength=vocab) + 1.0
    return float(-numpy.log(counts / counts.sum())[test[:, 1:].reshape(-1)].mean())


def test_figures(model: Any, train: numpy.ndarray, test: numpy.ndarray, tokenizer: Path) -> Mapping[str, float]:
    """What the finished model is worth on the test side."""
    import numpy

    from a1q.data.bpe import token_bytes

    loss = mean_loss(model, test)
    targets = test[:, 1:].reshape(-1)
    size = int(numpy.array(token_bytes(tokenizer))[targets].sum())
    return {
        "test_loss": loss,
        "test_ppl": math.exp(loss),
        "unigram_entropy": unigram_entropy(train, test, model.config.vocab_size),
        "bits_per_byte": loss * len(targets) / math.log(2) / size,
        "test_tokens": len(targets),
        "train_tokens_seen_once": int(train.size),
    }


def _seq_len(entry: Mapping[str, Any]) -> int:
    return int(entry["seq_len"])

"""Where a recipe's `model:` comes from: the built-in model, a folder, or the Hub. No torch."""

from __future__ import annotations

import difflib
from pathlib import Path

from a1q.engine.artifact import BESIDE, Artifact
from a1q.engine.digests import content_digest
from a1q.errors import MismatchError, StageError
from a1q.models.view import read_view, weight_files

BUILTIN = {"builtin:pico": Path(__file__).parent / "pico"}
OFFLINE = "offline, `builtin:pico` and folders work"
OTHER_COPIES = ["consolidated*", "original/*"]
"""The same weights under the names of their makers' own programs."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONTENT = ("*.json", "*.jinja", "*.txt", "*.model")
"""Files beside the weights that decide what a model computes: config, tokenizer, template."""


def resolve_source(source: str, revision: str | None = None) -> Artifact:
    """Find a model and its content digest.

    Args:
        source: `builtin:NAME`, a folder in Hugging Face layout (an a1q model artifact is one), or a Hub id.
        revision: branch, tag or commit on the Hub.

    Returns:
        An artifact of kind `model` whose path is the folder; its meta names source and revision.

    Raises:
        MismatchError: if there is no such model, the Hub can't be reached, the weights are not whole or not in
            safetensors, or the model wants code of its own to be run.
    """
    folder, found_revision = _folder(source, revision)
    try:
        config = read_view(folder).config
        if not isinstance(config.get("model_type"), str):
            raise StageError(f"{folder / 'config.json'} names no model_type")
    except StageError as error:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        hint = f"; {', '.join(pickles)} would have to be unpickled and is not read" if pickles else ""
        raise MismatchError(f"model {source}: {error}{hint}") from None
    if "auto_map" in config:
        raise MismatchError(
            f"model {source} brings code of its own (`auto_map` in its config.json), and a1q runs none; "
            "where transformers knows the architecture, a copy of the folder without `auto_map` works"
        )
    beside = [path.name for pattern in CONTENT for path in folder.glob(pattern) if path.name not in BESIDE]
    names = {*(path.name for path in weight_files(folder)), *beside}
    meta = {"source": source, "revision": found_revision}
    return Artifact("model", folder, content_digest(folder, names), meta, lambda: content_digest(folder, names))


def _folder(source: str, revision: str | None) -> tuple[Path, str | None]:
    """The model's folder on this machine, and the commit if it came from the Hub."""
    if source.startswith("builtin:"):
        if source in BUILTIN:
            return BUILTIN[source], None
        near = difflib.get_close_matches(source, BUILTIN, 1) or sorted(BUILTIN)
        raise MismatchError(f"there is no built-in model {source!r}; did you mean {near[0]!r}?")
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve(), None
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or path.exists()
    if looks_local:
        if path.exists():
            raise MismatchError(f"model {source}: not a folder")
        names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise MismatchError(f"model {source}: no such folder{hint}")
    return _from_hub(source, revision)


def _from_hub(source: str, revision: str | None) -> tuple[Path, str | None]:
    """Download, or find in the Hub's cache, the safetensors, config and tokenizer of a model."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        wanted = ["*.safetensors", *CONTENT]
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=wanted, ignore_patterns=OTHER_COPIES))
    except HFValidationError:
        raise MismatchError(f"model {source!r} is neither a folder nor a Hub id; {OFFLINE}") from None
    except (LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise MismatchError(f"model {source} is not on this machine and the Hub can't be reached; {OFFLINE}") from error
    except RepositoryNotFoundError:
        raise MismatchError(f"model {source}: the Hub has no such model, or it is private") from None
    except OSError as error:
        raise MismatchError(f"model {source}: the Hub can't be reached ({type(error).__name__}); {OFFLINE}") from error
    return folder, folder.name

"""`meta.yaml` and `config.json`, from which the apps learn what to load and how to call it. Light: no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from a1q.coreml.anemll.names import PREFIXES

VERSION = "0.3.4"
"""Version of ANEMLL whose conventions the packages follow; apps take 0.1.1 for another call order."""


def meta_yaml(meta: Mapping[str, Any]) -> str:
    """The text of meta.yaml.

    One of the apps reads it line by line instead of as YAML: two spaces before `parameters`, no quotes, no entry over
    two lines, and the first line with `version:` is the version.

    Args:
        meta: what meta.json says.
    """
    import yaml

    files = {role: [part["file"] for part in meta["parts"] if part["role"] == role] for role in _ROLES}
    chunks = files["ffn"]
    context, batch = meta["context"], meta["prefill"]
    info = {
        "name": f"a1q-{meta['name']}-ctx{context}",
        "version": VERSION,
        "description": f"{meta['name']} on the Neural Engine, context {context}, prefill {batch}, written by a1q",
        "framework": "Core ML",
        "language": "Python",
        "architecture": meta["model_type"],
        "parameters": {
            "context_length": context,
            "batch_size": batch,
            "lut_embeddings": _lut(files["embeddings"][0]),
            "lut_ffn": _lut(chunks[0]),
            "lut_lmhead": _lut(files["lm_head"][0]),
            "num_chunks": len(chunks),
            "model_prefix": PREFIXES[meta["model_type"]],
            "embeddings": _compiled(files["embeddings"][0]),
            "lm_head": _compiled(files["lm_head"][0]),
            "ffn": _compiled(re.sub(r"_chunk_\d+of\d+", "", chunks[0])),
            "split_lm_head": len(meta["outputs"]),
        },
    }
    return yaml.safe_dump({"model_info": info}, sort_keys=False, width=1000)


def config_json(meta: Mapping[str, Any], folder: Path) -> str:
    """The text of config.json: the type, the end tokens and the tokenizer's class.

    Without this file the apps would write one that says Llama.

    Args:
        folder: where tokenizer_config.json lies, if there is one.
    """
    config = {"model_type": meta["model_type"], "eos_token_id": meta["eos_token_id"]}
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        config["tokenizer_class"] = json.loads(tokenizer.read_text(encoding="utf-8")).get("tokenizer_class")
    return json.dumps({key: value for key, value in config.items() if value is not None}, indent=2) + "\n"


_ROLES = ("embeddings", "ffn", "lm_head")


def _lut(file: str) -> int | str:
    """Bits in a file name, or `none`."""
    found = re.search(r"_lut(\d+)", file)
    return int(found.group(1)) if found else "none"


def _compiled(file: str) -> str:
    """The name that a package gets when it is compiled, which the Swift apps ask for."""
    return file.removesuffix(".mlpackage") + ".mlmodelc"

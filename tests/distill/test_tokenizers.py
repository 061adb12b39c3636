import json

import pytest

from a1q.distill.tokenizers import chat_template_digest, require_cache_of, tokenizer_digest
from a1q.errors import MismatchError
from tests.tiny import write_tokenizer


def tokenizer(folder, vocabulary=320, template=None):
    folder.mkdir()
    write_tokenizer(folder, vocabulary)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings if template is None else {**settings, "chat_template": template}))
    return folder


def meta_of(folder, templated):
    return {"tokenizer": tokenizer_digest(folder), "chat_template": chat_template_digest(folder) if templated else None}


@pytest.mark.parametrize("templated", [False, True])
def test_another_chat_template_matters_where_the_text_went_through_one(tmp_path, templated):
    made, other = tokenizer(tmp_path / "made", template="a"), tokenizer(tmp_path / "other", template="b")
    meta = meta_of(made, templated)
    require_cache_of(made, meta, "stages.it.against")
    if not templated:
        require_cache_of(other, meta, "stages.it.against")
        return
    for folder, own in ((other, chat_template_digest(other)[:12]), (tokenizer(tmp_path / "none"), "none")):
        with pytest.raises(MismatchError) as error:
            require_cache_of(folder, meta, "stages.it.objective.kd")
        (problem,) = error.value.problems
        assert problem.path == "stages.it.objective.kd" and "kd" in problem.hint
        assert problem.message == f"`chat_template` of the cache is {meta['chat_template'][:12]}, the model's is {own}"


def test_another_tokenizer_is_named_with_both_digests(tmp_path):
    meta, other = meta_of(tokenizer(tmp_path / "made"), False), tokenizer(tmp_path / "other", 300)
    with pytest.raises(MismatchError) as error:
        require_cache_of(other, meta, "stages.it.objective.kd")
    (problem,) = error.value.problems
    own = tokenizer_digest(other)[:12]
    assert problem.message == f"`tokenizer` of the cache is {meta['tokenizer'][:12]}, the model's is {own}"

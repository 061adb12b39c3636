import json

import pytest

from a1q.distill.tokenizers import chat_template_digest, prompts_of, require_cache_of, tokenizer_digest
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


TURNS = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ' .' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% if enable_thinking is false %}{{ ' no' }}{% endif %}{% endif %}"
)


def test_the_same_words_and_template_with_other_prompt_tokens_are_told_by_the_way_of_thinking(tmp_path):
    made, other = tokenizer(tmp_path / "made", template=TURNS), tokenizer(tmp_path / "other", template=TURNS)
    meta = {**meta_of(made, True), "prompts": prompts_of(made, ["on", "off"])}
    assert meta["prompts"]["on"] != meta["prompts"]["off"]
    require_cache_of(other, meta, "stages.it.objective.kd")
    path = other / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["pre_tokenizer"]["add_prefix_space"] = True  # cuts texts otherwise into the same vocabulary
    path.write_text(json.dumps(settings))
    own = prompts_of(other, ["on", "off"])
    with pytest.raises(MismatchError) as error:
        require_cache_of(other, meta, "stages.it.objective.kd")
    assert [problem.message for problem in error.value.problems] == [
        f"`prompts.{name}` of the cache is {meta['prompts'][name][:12]}, the model's is {own[name][:12]}"
        for name in ("on", "off")
    ]

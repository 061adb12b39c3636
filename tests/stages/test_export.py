from a1q.engine.registry import load_registry
from a1q.engine.stage import PlanContext
from a1q.models.view import ModelView, ModuleView
from a1q.stages.export import ExportStage


def plan(options, state):
    load_registry()
    module = ModuleView("model.layers.0.mlp.up_proj", (96, 64), state=state)
    problems = []
    ctx = PlanContext(
        id="hf",
        config=ExportStage.make_config(options),
        views={"model": ModelView({module.name: module}, 64 * 96)},
        groups={},
        data={},
        report=lambda *problem: problems.append(problem),
    )
    return ExportStage().plan(ctx), problems


OPTIONS = {"format": "safetensors", "shard_size": "5GB", "verify_tokens": 0, "min_cosine": 0.999}


def test_the_exporter_refuses_in_the_plan():
    outcome, problems = plan(OPTIONS, "quantized")
    ((path, message, _, mismatch),) = problems
    assert path == "format" and "not snapped" in message and mismatch
    assert outcome.disk_bytes == 0


def test_the_plan_knows_the_size():
    outcome, problems = plan(OPTIONS, "dense")
    assert not problems and outcome.disk_bytes == 2 * 64 * 96 and outcome.view == {"format": "safetensors"}


def test_the_config_is_the_exporters_own():
    config = ExportStage.make_config(OPTIONS)
    assert (config.format, config.options.shard_size, config.options.verify_tokens) == ("safetensors", "5GB", 0)

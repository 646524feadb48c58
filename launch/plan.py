"""The plan of a run: from a config to the steps that carry it out."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.checks import require_budgets, require_paths
from configs.errors import ConfigError
from configs.load import config_hash, nearest, parse_section, save_config, to_dict
from configs.schema import FREE_STAGE_KEYS, RunConfig, StageConfig
from data.codec import codec_identity
from data.ingest import encode, ingest
from data.negative import write_negative
from data.targets import STORED
from data.text import text_identity
from launch.export import find_export, read_manifest
from launch.source import fingerprint, list_videos, write_list
from launch.steps import Step, is_leader, run_one_step, run_steps
from launch.student import outline
from models.kv_policies import build_policy
from train.kind import rank_share
from train.kinds import stage_kind
from train.lora import require_peft, target_layers
from train.world import resolve_world

NEGATIVE_STEP = "encode-negative"
"""Encodes `text.negative`, if a stage guides; changing it encodes no clip again."""


def run_folder(config: RunConfig) -> Path:
    """Where a run keeps everything."""
    return Path(config.runs_dir) / config.name


def plan_steps(config: RunConfig, *, last: str | None = None) -> list[Step]:
    """Steps of the run in order: data, stages, evaluation, report.

    Args:
        config: Of the run.
        last: The step that ends the list; what only steps behind it read need not be there.

    Raises:
        UserError: If a path is not set, or the videos or an export that these steps start from are
            missing.
    """
    steps: list[Step] = []
    for step in _steps(config):
        steps.append(step)
        if step.name == last:
            break
    return steps


def _steps(config: RunConfig) -> Iterator[Step]:
    """The same one by one, so that a step asks for no more than it and those before it read."""
    yield from _data_steps(config)
    for name in config.stages:
        yield from _target_steps(config, name)
        yield _stage_step(config, name)
    if config.evaluate.stages:
        yield from _closing_steps(config)


def run(config: RunConfig, *, restart: bool = False) -> None:
    """Carry out the whole plan; skip what is complete, continue what was interrupted.

    Args:
        config: Of the run.
        restart: Set unfinished stages with other settings aside and start them anew.

    Raises:
        UserError: If the plan cannot work, another process is at work in the run folder, or an
            unfinished stage holds checkpoints that were made with other settings.
    """
    check, root = (lambda: check_run(config)), run_folder(config)
    run_steps(plan_steps(config), root=root, check=check, restart=restart)


def run_one(config: RunConfig, name: str, *, restart: bool = False) -> None:
    """Carry out one step, whose parents must be complete.

    What only this stage reads is written first: targets, and the negative prompt.

    Args:
        config: Of the run.
        name: Of the step; `encode` means both of its steps.
        restart: As in `run`.

    Raises:
        UserError: If there is no such step, a parent is not complete, or as in `run`.
    """
    steps = plan_steps(config, last=name)
    names = [step.name for step in steps]
    if name not in names:
        raise ConfigError(f"the plan has the steps {names}, found {name!r}{nearest(name, names)}")
    check = (lambda: check_run(config, name)) if name in config.stages else None
    reads_negative = name == "encode" or (check is not None and config.stages[name].is_guided)
    before = [_target_step_name(name), *([NEGATIVE_STEP] if reads_negative else [])]
    for wanted in (*before, name):
        if wanted in names:
            run_one_step(steps, wanted, root=run_folder(config), check=check, restart=restart)


def check_run(config: RunConfig, *stages: str) -> None:
    """Raise `UserError` if the stages cannot work on the ranks and with the inputs there are.

    Args:
        config: Of the run.
        *stages: Those whose inputs are read; all if there are none.
    """
    from launch.inputs import check_inputs

    check_stages(config, ranks=resolve_world(config.trainer).size)
    check_inputs(config, stages or tuple(config.stages))


def check_stages(config: RunConfig, *, ranks: int = 1) -> None:
    """Raise `ConfigError` if a stage is of no known kind or its settings cannot work.

    Args:
        config: Of the run.
        ranks: That share out every batch.
    """
    for name, stage in config.stages.items():
        key, cls = f"stages.{name}", stage_kind(stage.kind)
        params: Any = parse_section(cls.params_type, stage.params, key=f"{key}.params")
        rank_share(stage, ranks)
        cls.check(stage, params, key=key, block=config.model.frames_per_block)
        _check_cache(to_dict(params), f"{key}.params", config)
        _check_lora(stage, key, config)
        wanted = sorted(cls.network_sources)
        if sorted(stage.optimizers) != wanted:
            raise ConfigError(
                f"{key}.optimizers must name the networks that it trains, {wanted}, "
                f"found {sorted(stage.optimizers)}"
            )


def _check_cache(params: dict[str, Any], key: str, config: RunConfig) -> None:
    """Check budgets and policy of a stage that rolls out; other stages have neither."""
    budgets = {name: params[name] for name in ("budgets", "budget_tokens") if name in params}
    for name, found in budgets.items():
        values = found if isinstance(found, list) else [found]
        block = config.model.frames_per_block
        require_budgets(f"{key}.{name}", values, params["sink_frames"], block, config)
    if "policy" in params:
        try:
            build_policy(params["policy"], params["policy_params"])
        except ValueError as error:
            raise ConfigError(f"{key}.policy: {error}") from error


def _check_lora(stage: StageConfig, key: str, config: RunConfig) -> None:
    """Check that every target of adapters names a layer of the network."""
    if stage.lora is not None:
        require_peft()
        network = outline(to_dict(config.model))
        target_layers(network, stage.lora.targets, key=f"{key}.lora.targets")


def data_folder(config: RunConfig) -> Path:
    """Where the world and the shards of a run lie."""
    return run_folder(config) / "data"


def targets_folder(config: RunConfig, stage_name: str) -> Path:
    """Where the stored targets of a stage lie, if it reads such."""
    return data_folder(config) / _target_step_name(stage_name)


def negative_folder(config: RunConfig) -> Path:
    """Where the encoded `text.negative` lies, if a stage guides."""
    return data_folder(config) / "negative"


def _target_step_name(stage_name: str) -> str:
    return f"targets-{stage_name}"  # no stage is called so: a stage's name has no hyphen


def data_steps(config: RunConfig) -> list[Step]:
    """The steps from the source to latents, in order."""
    return list(_data_steps(config))


def _data_steps(config: RunConfig) -> Iterator[Step]:
    data, source = data_folder(config), config.source
    shards = {"samples_per_shard": config.data.samples_per_shard}
    cut = {key: getattr(source, key) for key in ("size", "frames", "stride", "every")}
    cut |= {} if source.rate is None else {"rate": source.rate}
    videos: list[Any] = []
    parents: list[Step] = []
    if source.kind == "world":
        world = _data_step("world", data / "world", source.world, lambda: _write_world(config))
        parents.append(world)
        yield world
    else:
        require_paths(config, source.path, source.folder)
        videos = fingerprint(list_videos(source))
    settings = {"videos": videos, "min_frames": _min_frames(config)} | shards
    ingested = _data_step("ingest", data / "raw", settings, lambda: _ingest(config), *parents)
    yield ingested
    require_paths(config, config.codec.path, config.text.path)
    yield from _negative_steps(config)
    made_by = {"codec": codec_identity(config.codec), "text": text_identity(config.text)}
    settings = made_by | cut | shards
    yield _data_step("encode", data / "latents", settings, lambda: _encode(config), ingested)


def _negative_steps(config: RunConfig) -> list[Step]:
    """The step that encodes the negative prompt, if a stage guides.

    It comes before the clips, so that a prompt that is too long is found before they are encoded.
    """
    if not any(stage.is_guided for stage in config.stages.values()):
        return []
    settings = {"text": text_identity(config.text), "negative": config.text.negative}
    folder = negative_folder(config)
    return [_data_step(NEGATIVE_STEP, folder, settings, lambda: _encode_negative(config))]


def _min_frames(config: RunConfig) -> int:
    """Frames that a video needs for one clip."""
    return (config.source.frames - 1) * config.source.every + 1


def _data_step(
    name: str, folder: Path, settings: Any, work: Callable[[], None], *parents: Step
) -> Step:
    """A step whose folder belongs to a writer of `data/`; the records lie beside it."""
    return Step(
        name=name,
        folder=folder,
        settings=settings,
        run=work,
        parents=tuple(parent.name for parent in parents),
        outputs=(folder,),
        records=folder.parent / "steps" / name,
    )


def _origins(
    config: RunConfig, stage_name: str, *roles: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Inputs of a stage by role: hashes of exports from elsewhere, names of stages of the plan.

    Args:
        config: Of the run.
        stage_name: Of the stage.
        *roles: Only these; all if there are none.
    """
    inputs = config.stages[stage_name].inputs
    inputs = {role: inputs[role] for role in inputs if role in roles or not roles}
    require_paths(config, *inputs.values())
    external = {
        role: config_hash(read_manifest(find_export(Path(origin))))
        for role, origin in inputs.items()
        if origin not in config.stages
    }
    return external, {role: origin for role, origin in inputs.items() if origin in config.stages}


def _target_steps(config: RunConfig, name: str) -> list[Step]:
    """The step that writes what a stage's teacher says of every clip, if the stage reads it."""
    stage = config.stages[name]
    if stage.params.get("targets") != STORED:
        return []
    external, roles = _origins(config, name, "teacher")
    folder = targets_folder(config, name)
    settings = {
        "inputs": external,
        "sigma": stage.params.get("sigma"),
        "frames": stage.frames,
        "model": config.model,
        "precision": config.trainer.precision,
        "samples_per_shard": config.data.samples_per_shard,
    }
    step = Step(
        name=folder.name,
        folder=folder,
        settings=settings,
        run=lambda: _write_targets(config, name),
        parents=("encode", *roles.values()),
        outputs=(folder,),
        records=data_folder(config) / "steps" / folder.name,
    )
    return [step]


def _stage_step(config: RunConfig, name: str) -> Step:
    stage, folder = config.stages[name], run_folder(config) / name
    own = {key: value for key, value in to_dict(stage).items() if key not in FREE_STAGE_KEYS}
    external, roles = _origins(config, name)
    read = [NEGATIVE_STEP] if stage.is_guided else []
    read += [step.name for step in _target_steps(config, name)]
    settings = {
        "stage": own | {"inputs": external},
        "roles": roles,
        "seed": config.seed if stage.seed is None else stage.seed,
        "model": config.model,
        "head": config.head,
        "window_shards": config.data.window_shards,
        "precision": config.trainer.precision,
    }
    return Step(
        name=name,
        folder=folder,
        settings=settings,
        run=lambda: _train(config, name, folder),
        parents=("encode", *dict.fromkeys(roles.values()), *read),
        outputs=(folder / "export",),
        on_all_ranks=True,
        protect=lambda remade: _protect_stage(config, name, folder, remade),
    )


def _closing_steps(config: RunConfig) -> list[Step]:
    folder = run_folder(config)
    evaluate = Step(
        name="evaluate",
        folder=folder / "evaluate",
        settings={"evaluate": config.evaluate, "world": config.source.world},
        run=lambda: _evaluate(config),
        parents=("encode", *config.evaluate.stages),
        outputs=(folder / "evaluate" / "results.json",),
    )
    report = Step(
        name="report",
        folder=folder / "report",
        settings={},
        run=lambda: _report(config),
        parents=("evaluate", *config.stages),
        outputs=(folder / "report" / "index.html",),
    )
    return [evaluate, report]


def _write_world(config: RunConfig) -> None:
    from data.world import write_world

    write_world(config.source.world, data_folder(config) / "world")


def _ingest(config: RunConfig) -> None:
    folder = data_folder(config)
    source = folder / "world"
    if config.source.kind == "videos":
        source = folder / "videos.jsonl"
        write_list(list_videos(config.source), source)
    ingest(
        source,
        folder / "raw",
        samples_per_shard=config.data.samples_per_shard,
        min_frames=_min_frames(config),
        rate=config.source.rate,
    )


def _encode_negative(config: RunConfig) -> None:
    from train.strategy import uses_gpu

    device = "cuda" if uses_gpu(config.trainer) else "cpu"
    write_negative(negative_folder(config), text=config.text, device=device)


def _encode(config: RunConfig) -> None:
    from train.strategy import uses_gpu

    folder, source = data_folder(config), config.source
    encode(
        folder / "raw",
        folder / "latents",
        codec=config.codec,
        text=config.text,
        size=(source.size[0], source.size[1]),
        frames=source.frames,
        stride=source.stride,
        every=source.every,
        rate=source.rate,
        samples_per_shard=config.data.samples_per_shard,
        device="cuda" if uses_gpu(config.trainer) else "cpu",
    )


def _write_targets(config: RunConfig, name: str) -> None:
    from launch.stored_targets import write_stage_targets

    write_stage_targets(config, name)


def _train(config: RunConfig, name: str, folder: Path) -> None:
    from launch.build import run_stage

    if is_leader():
        save_config(config, folder / "config.yaml")
    run_stage(config, name)


def _protect_stage(config: RunConfig, name: str, folder: Path, remade: Sequence[str]) -> None:
    from launch.unfinished import require_same_settings

    require_same_settings(config, name, folder, remade=remade)


def _evaluate(config: RunConfig) -> None:
    from launch.evaluate import evaluate

    folder = run_folder(config)
    evaluate(config, [folder / name for name in config.evaluate.stages], folder / "evaluate")


def _report(config: RunConfig) -> None:
    from launch.report import write_report

    write_report(run_folder(config))

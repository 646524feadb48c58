"""What a stage starts from: the exports behind the roles that its `inputs` name."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, UserError
from configs.load import to_dict
from configs.schema import RunConfig, StageConfig
from launch.export import Export, load_export, open_export
from launch.plan import run_folder
from train.kinds import stage_kind


def input_paths(config: RunConfig, stage: StageConfig) -> dict[str, Path]:
    """Folder of the export behind each input role."""
    return {
        role: Path(origin) if "/" in origin else run_folder(config) / origin
        for role, origin in stage.inputs.items()
    }


def load_inputs(
    config: RunConfig, stage_name: str, *, roles: Iterable[str] | None = None
) -> dict[str, Export]:
    """The exports a stage starts from, checked for role and network geometry.

    Args:
        config: Of the run.
        stage_name: Of the stage.
        roles: Only these inputs; None = all.

    Raises:
        UserError: If one is missing, has another role, or was made with another network.
    """
    stage = config.stages[stage_name]
    exports = {}
    for role, path in input_paths(config, stage).items():
        if roles is not None and role not in roles:
            continue
        export = load_export(path, role=_expected_role(stage_name, role))
        if role == "critic" and export.manifest["role"] != "teacher":
            export.tensors("critic")  # a student's export must hold one
        _check_model(config, stage_name, role, export)
        exports[role] = export
    return exports


def check_inputs(config: RunConfig, stages: Iterable[str]) -> None:
    """Check the exports that these stages take from outside of the run, without their weights.

    Raises:
        UserError: As in `load_inputs`.
    """
    for name in stages:
        for role, origin in config.stages[name].inputs.items():
            if "/" in origin:
                open_input(config, name, role)


def open_input(config: RunConfig, stage_name: str, role: str) -> Export:
    """An export from outside of the run, without its weights.

    Args:
        config: Of the run.
        stage_name: Of the stage.
        role: One of those in its `inputs` that name a path.

    Raises:
        UserError: As in `load_inputs`.
    """
    path = Path(config.stages[stage_name].inputs[role])
    export = open_export(path, role=_expected_role(stage_name, role))
    _check_model(config, stage_name, role, export)
    return export


def _expected_role(stage_name: str, role: str) -> str | None:
    """What an export must be to serve as an input; a critic may start from either."""
    expected = {"teacher": "teacher", "student": "student", "critic": None}
    if role not in expected:
        raise ConfigError(
            f"stages.{stage_name}.inputs knows the roles {list(expected)}, found {role!r}"
        )
    return expected[role]


def _check_model(config: RunConfig, stage_name: str, role: str, export: Export) -> None:
    found = model_of("critic" if role == "critic" else "transformer", export.manifest["config"])
    require_geometry(config, stage_name, role, found, where=str(export.folder))


def require_geometry(
    config: RunConfig, stage_name: str, role: str, found: Mapping[str, Any], *, where: str
) -> None:
    """Raise `UserError` unless the networks of an input can work together with those of the run.

    A student is the network of the run. A teacher is, too, if the student starts from it; if only
    what it says is read, it may have another size. A critic starts from what judges like a teacher.

    Args:
        config: Of the run.
        stage_name: Of the stage.
        role: Of the input.
        found: Geometry of its network.
        where: What has that geometry, for messages.
    """
    wanted, cls = to_dict(config.model), stage_kind(config.stages[stage_name].kind)
    keys = [key for key in wanted if role == "student" or key != "frames_per_block"]
    starts = [source for source, _ in cls.network_sources.get("student", ())]
    if role != "student" and role not in starts:
        keys = list(cls.shared_geometry)
    wrong = [key for key in sorted(keys) if found.get(key) != wanted[key]]
    if wrong:
        raise UserError(
            f"{where} must hold the network of this run, but differs in model."
            f"{', model.'.join(wrong)}; take another checkpoint or change the config"
        )


def model_of(stem: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Geometry of the transformer in a file of an export, from the section `config` it has."""
    found = config.get(stem, config["model"])
    assert isinstance(found, dict)
    return found


def critic_model(inputs: Mapping[str, Export]) -> dict[str, Any] | None:
    """Geometry of the critic of a stage, if the input that it starts from is at hand."""
    for role in ("critic", "teacher"):
        if role in inputs:
            return model_of("critic", inputs[role].manifest["config"])
    return None

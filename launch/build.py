"""From a config to a stage that can be trained: networks, their inputs, data, and the export."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.load import config_hash, parse_section, to_dict
from configs.schema import LoraConfig, RunConfig
from data.codec import build_codec
from data.datamodule import LatentDataModule
from data.negative import read_negative
from data.shards import ShardSet
from data.targets import STORED, TargetSet, TargetSource
from launch.export import ADAPTERS, Export, map_weights, write_export
from launch.geometry import network_config, sampling_config, token_grid
from launch.inputs import critic_model, load_inputs, model_of
from launch.plan import data_folder, negative_folder, run_folder, targets_folder
from launch.student import head_from_config, transformer_from_config
from models.transformer import VideoTransformer
from train.causal import Causal
from train.compilation import compile_layers
from train.distill import Distill
from train.fit import fit, run_info
from train.kinds import stage_kind
from train.lora import adapter_tensors, add_adapter, base_tensors, merge_into
from train.randomness import derive_seed
from train.salience import SalienceStage
from train.stage import Stage
from train.strategy import uses_gpu
from train.streaming import Streaming
from train.teacher import Teacher
from train.tracking import log_export

STAGES: dict[str, type[Stage]] = {
    "teacher": Teacher,
    "causal": Causal,
    "distill": Distill,
    "salience": SalienceStage,
    "streaming": Streaming,
}
"""What trains the stages of each kind in `train.kinds.KINDS`."""


def latents_folder(config: RunConfig) -> Path:
    """Shards that the stages train on."""
    return data_folder(config) / "latents"


def stage_seed(config: RunConfig, stage_name: str) -> int:
    """Seed of a stage: its own, or derived from the run's and its name."""
    own = config.stages[stage_name].seed
    return own if own is not None else derive_seed(config.seed, "stage", stage_name)


def _new_network(name: str, config: dict[str, Any]) -> nn.Module:
    """The salience head or a transformer with fresh weights, from a `network_config`."""
    if name == "head":
        return head_from_config(config)
    return transformer_from_config(model_of(name, config))


def _fresh_network(config: RunConfig, stage_name: str, name: str) -> nn.Module:
    """A network with weights that follow from the seed of its stage and its name."""
    params = config.stages[stage_name].params
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would set the generators of all GPUs as well.
        torch.default_generator.manual_seed(
            derive_seed(stage_seed(config, stage_name), "weights", name)
        )
        targets = {key: bool(params.get(key, False)) for key in ("log", "per_block")}
        return _new_network(name, network_config(config, **targets))


def _build_network(
    config: RunConfig,
    stage_name: str,
    name: str,
    sources: tuple[tuple[str, str], ...],
    exports: Mapping[str, Export],
) -> nn.Module:
    """A network of a stage: fresh if it has no sources, else mapped from the first one given."""
    if not sources:
        return _fresh_network(config, stage_name, name)
    given = [(role, stem) for role, stem in sources if role in exports]
    if not given:
        raise ConfigError(
            f"stages.{stage_name}.inputs must name one of {sorted({role for role, _ in sources})} "
            f"for its {name}, found {list(exports)}; add an earlier stage or the path of an export"
        )
    held = [(role, stem) for role, stem in given if stem in exports[role].weights]
    role, stem = (held or given)[0]
    with torch.device("meta"):
        network = _new_network(name, exports[role].manifest["config"])
    map_weights(network, exports[role], stem=stem)
    return network


def new_stage(
    config: RunConfig,
    stage_name: str,
    exports: Mapping[str, Export],
    *,
    frozen: Iterable[str],
    is_fresh: bool = False,
    negative_text: Tensor | None = None,
) -> Stage:
    """A stage with its trainable networks and those of its frozen ones that are named.

    Args:
        config: Of the run.
        stage_name: Of the stage.
        exports: Its inputs by role.
        frozen: Names of frozen networks.
        is_fresh: Whether all networks get fresh weights and no input is needed.
        negative_text: What the guidance of a stage that trains leads away from.  [T, E]
    """
    settings = config.stages[stage_name]
    kind = stage_kind(settings.kind)
    grid = token_grid(config)
    trained, read = (
        {
            name: _build_network(config, stage_name, name, () if is_fresh else sources, exports)
            for name, sources in wanted.items()
        }
        for wanted in (kind.network_sources, {name: kind.frozen_sources[name] for name in frozen})
    )
    if settings.lora is not None:
        for name in settings.lora.networks:
            seed = derive_seed(stage_seed(config, stage_name), "adapter", name)
            key = f"stages.{stage_name}.lora"
            add_adapter(trained[name], settings.lora, seed=seed, key=key)
    for network in trained.values():
        if isinstance(network, VideoTransformer):
            network.recomputes_activations = config.trainer.activation_checkpointing
    if config.trainer.compile:
        device = torch.device("cuda" if uses_gpu(config.trainer) else "cpu")
        compile_layers([*trained.values(), *read.values()], device=device)
    return STAGES[settings.kind](
        settings,
        seed=stage_seed(config, stage_name),
        networks=trained,
        frozen=read,
        params=parse_section(kind.params_type, settings.params, key=f"stages.{stage_name}.params"),
        frames_per_block=config.model.frames_per_block,
        frame_seq_len=grid[0] * grid[1],
        negative_text=negative_text,
    )


def build_stage(config: RunConfig, stage_name: str) -> tuple[Stage, LatentDataModule]:
    """A stage with its networks, and its data, ready for `fit`.

    Raises:
        UserError: If the config, an input or the data set does not fit.
    """
    settings = config.stages[stage_name]
    exports = load_inputs(config, stage_name)
    frozen = stage_kind(settings.kind).frozen_sources
    negative = None
    if settings.is_guided:
        clips, folder = ShardSet(latents_folder(config)), negative_folder(config)
        negative = read_negative(folder, clips=clips, negative=config.text.negative)
    stage = new_stage(config, stage_name, exports, frozen=frozen, negative_text=negative)
    targets = None
    if isinstance(stage, SalienceStage) and stage.params.targets == STORED:
        source = target_source(config, stage, exports["teacher"])
        targets = TargetSet(targets_folder(config, stage_name), source)
    return stage, build_data(config, stage, targets)


def build_data(
    config: RunConfig, stage: Stage, targets: TargetSet | None = None
) -> LatentDataModule:
    """The batches of a stage, from the shards of the run."""
    settings = stage.config
    return LatentDataModule(
        latents_folder(config),
        batch_size=settings.batch,
        frames=settings.frames,
        seed=stage.seed,
        workers=config.data.workers,
        window_shards=config.data.window_shards,
        num_batches=settings.steps,
        targets=targets,
        has_next_text=isinstance(stage, Streaming) and stage.params.switch_chance > 0,
    )


def target_source(config: RunConfig, stage: SalienceStage, teacher: Export) -> TargetSource:
    """What the stored targets of a stage must be made from."""
    return TargetSource(
        clips=ShardSet(latents_folder(config)).hash,
        teacher=teacher.hash,
        sigma=stage.params.sigma,
        frames=stage.config.frames,
        block_len=stage.block_len,
        precision=config.trainer.precision,
    )


def run_stage(config: RunConfig, stage_name: str) -> None:
    """Train a stage to its end, from its newest checkpoint if there is one, and export it."""
    exports = load_inputs(config, stage_name)
    stage = train_stage(config, stage_name, exports)
    export_stage(config, stage_name, stage, exports)
    stage.close()


def train_stage(
    config: RunConfig,
    stage_name: str,
    inputs: Mapping[str, Export],
    *,
    callbacks: Sequence[Callback] = (),
) -> Stage:
    """Train a stage to its end; `callbacks` come before those of `fit`."""
    stage, datamodule = build_stage(config, stage_name)
    fit(
        stage,
        datamodule,
        folder=run_folder(config) / stage_name,
        config=config,
        stage_name=stage_name,
        decode=preview_decoder(config),
        fps=config.fps,
        input_hashes={role: export.hash for role, export in inputs.items()},
        data_hash=datamodule.shards.hash,
        callbacks=callbacks,
    )
    return stage


def preview_decoder(config: RunConfig) -> Callable[[Tensor], Tensor]:
    """What turns the latents of a preview into frames.

    A codec with weights is loaded with the first preview, so only on the rank that writes videos,
    and only if the stage has `sample_every`.
    """
    load = functools.cache(functools.partial(build_codec, config.codec))
    return lambda latents: load(latents.device).decode(latents)


def export_stage(
    config: RunConfig, stage_name: str, stage: Stage, inputs: Mapping[str, Export]
) -> None:
    """Write the export of a trained stage; all ranks must call this together."""
    weights = {
        stem: stage.engine(name).weights(ema=stage.engine(name).settings.ema > 0)
        for stem, name in stage.exported.items()
        if name in stage.engines
    }
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    for stem, name in stage.exported.items():
        if name in stage.frozen:
            # From its export: the stage's own copy may be spread over ranks.
            sources = stage.frozen_sources[name]
            network = _build_network(config, stage_name, name, sources, inputs)
            weights[stem] = dict(network.state_dict())
    if stage.config.lora is not None:
        _separate_adapters(weights, stage, stage.config.lora)
    folder = run_folder(config) / stage_name
    manifest = export_manifest(config, stage, stage_name, inputs)
    digest = write_export(folder / "export", weights=weights, manifest=manifest, replaces=True)
    shown = ("role", "stage", "kind", "train_seed", "steps", "parents", "config_hash")
    data = ShardSet(latents_folder(config)).hash
    log_export(
        config.tracking,
        run_info(config, stage_name, folder=folder, identity=stage.identity, data=data),
        export=folder / "export",
        metadata={key: manifest[key] for key in shown} | {"hash": digest},
    )


def _separate_adapters(
    weights: dict[str, dict[str, Tensor]], stage: Stage, settings: LoraConfig
) -> None:
    """Merge adapted networks, and put their adapters beside them, under stems of their own."""
    for stem, name in stage.exported.items():
        if name in settings.networks:
            state = weights.pop(stem)
            weights[ADAPTERS[stem]] = adapter_tensors(state)
            weights[stem] = base_tensors(state)
            del state  # so that each tensor goes as its successor comes
            merge_into(weights[stem], weights[ADAPTERS[stem]], scale=settings.scale)


def export_manifest(
    config: RunConfig, stage: Stage, stage_name: str, inputs: Mapping[str, Export]
) -> dict[str, object]:
    """What a loader must know about an export.

    A stage that leaves the student alone hands on the sampler and the cache policy of its input.
    """
    sampler, policy = stage.sampler_sigmas(), stage.cache_policy()
    if sampler is None and "student" in inputs:
        sampler, policy = inputs["student"].sampler, inputs["student"].manifest.get("policy")
    lora = stage.config.lora
    heads = [group["head"] for group in (stage.networks, stage.frozen) if "head" in group]
    critic = critic_model(inputs) if "critic" in stage.exported else None
    return {
        "role": stage.export_role,
        "stage": stage_name,
        "kind": config.stages[stage_name].kind,
        "train_seed": config.seed,
        "steps": stage.completed,
        "sampler": None if sampler is None else {"sigmas": sampler[0], "renoise": sampler[1]},
        "policy": policy,
        "weights": _exported_set(stage, inputs),
        "config": sampling_config(
            config,
            frames=config.stages[stage_name].frames,
            log=any(head.log for head in heads),
            per_block=any(head.block_len for head in heads),
        )
        | ({} if critic is None else {"critic": critic}),
        "lora": None if lora is None else to_dict(lora),
        "parents": {role: export.hash for role, export in inputs.items()},
        "config_hash": config_hash(config),
    }


def _exported_set(stage: Stage, inputs: Mapping[str, Export]) -> str | None:
    """`ema` or `raw`: whether the exported transformer is a moving average; None if unknown."""
    name = stage.exported["transformer"]
    if name in stage.networks:
        return "ema" if stage.config.optimizers[name].ema > 0 else "raw"
    found = [inputs[role] for role, _ in stage.frozen_sources[name] if role in inputs]
    return found[0].manifest.get("weights") if found else None

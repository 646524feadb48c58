"""Reading configurations: merging, overrides, and messages that name the key and the remedy."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from configs.errors import ConfigError, UserError
from configs.load import config_hash, load_config, nearest, parse_section, save_config, to_dict

BASE = """
name: base
seed: 3
stages:
  teacher: {kind: teacher, steps: 7, batch: 2, frames: 5, optimizers: {teacher: {lr: 0.003}}}
  causal: {kind: causal, steps: 9, batch: 2, frames: 5, inputs: {teacher: teacher}}
evaluate: {stages: [causal]}
"""


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return str(path)


def test_files_merge_from_left_to_right_and_overrides_come_last(base, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("seed: 4\nmodel: {num_layers: 5}\nstages: {teacher: {steps: 70}}\n")
    config = load_config([base, str(second), "seed=5", "stages.causal.params.a.b=[1,2]"])
    assert (config.seed, config.model.num_layers, config.stages["teacher"].steps) == (5, 5, 70)
    assert config.stages["teacher"].batch == 2
    assert config.stages["causal"].params == {"a": {"b": [1, 2]}}
    assert config.stages["teacher"].optimizers["teacher"].lr == 0.003


def test_the_order_of_arguments_does_not_let_a_file_win_over_an_override(base):
    assert load_config(["seed=5", base]).seed == 5


def test_a_path_with_an_equals_sign_is_a_path(base, tmp_path, monkeypatch):
    folder = tmp_path / "lr=3"
    folder.mkdir()
    (folder / "more.yaml").write_text("name: other\n")
    assert load_config([base, str(folder / "more.yaml")]).name == "other"
    monkeypatch.chdir(tmp_path)
    assert load_config([base, "lr=3/more.yaml"]).name == "other"


def test_stages_keep_the_order_of_the_file(base):
    assert list(load_config([base]).stages) == ["teacher", "causal"]


def test_a_saved_config_reads_back_equal(base, tmp_path):
    config = load_config([base, "stages.causal.params.x=1e-3"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config([str(tmp_path / "saved.yaml")]) == config
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.num_layers=3", "'modle' is not a key of the configuration; did you mean 'model'?"),
        ("model.num_layer=3", r"'model\.num_layer' is not a key.*did you mean 'num_layers'\?"),
        ("stages.teacher.stepz=3", r"'stages\.teacher\.stepz' is not.*did you mean 'steps'\?"),
        ("stages.teacher.optimizers.teacher.ir=3", "did you mean 'lr'"),
        ("source.world.sed=3", r"'source\.world\.sed' is not a key.*did you mean 'seed'\?"),
        ("qqqqqq=3", "'qqqqqq' is not a key of the configuration; remove it"),
        ("model.num_layers=many", r"'model\.num_layers' has a wrong value: Value 'many'"),
        ("stages=3", "'stages' has a wrong value"),
        ("stages.new.kind=teacher", r"'stages\.new\.steps' must be set, found no value"),
        ("stages.teacher.optimizers.teacher.lr=-1", r"lr must not be negative, found -1"),
        ("model.num_layers=0", r"model\.num_layers must be above 0, found 0"),
        ("tracking.finish_seconds=0", r"tracking\.finish_seconds must be above 0, found 0"),
        ("trainer.peak_tflops=-1", r"trainer\.peak_tflops must not be negative, found -1"),
        ("stages.teacher.steps=0", r"stages\.\*\.steps must be above 0, found 0"),
        ("source.world.identities=9", r"source\.world\.period must be 2 x .* = 18, found 20"),
        ("source.kind=film", r"source\.kind must be one of \['world', 'videos'\], found 'film'"),
        ("source.size=[30,64]", r"multiples of codec\.stride x model\.patch_size = 16"),
        ("codec.name=vae", r"codec\.name must be one of \['transform', 'wan'\], found 'vae'"),
        ("codec.time_stride=4", r"codec\.time_stride must be 1 with codec\.name=transform, which"),
        ("text.path=x", r"text\.path must be '' with text\.name=hashed, which has no use for it"),
        ("text.precision=bf16", r"text\.precision must be 'fp32' with text\.name=hashed"),
        ("source.fps=0", r"source\.fps must be above 0"),
        ("codec.channels=12", r"model\.in_channels must be codec\.channels=12, found 16"),
        ("text.dim=48", r"model\.text_dim must be text\.dim=48, found 32"),
        ("name=a/b", "name must be a folder name"),
        ("source.every=2", r"must be empty unless source\.every=1, found source\.every=2"),
        ("stages.causal.inputs.teacher=teachr", r"stages\.causal\.inputs\.teacher must be"),
        ("stages.causal.inputs.teacher=causal", r"must be an earlier stage of the plan"),
        ("stages.teacher.frames=73", r"must not be above the 72 latent frames of a clip.*found 73"),
        ("evaluate.stages=[caual]", r"evaluate\.stages must be one of .*found 'caual'"),
        ("evaluate.tune_seed=1", r"tune_seed=1 must not be one of evaluate\.seeds=\[0, 1, 2\]"),
        ("evaluate.frames=[24]", r"must all be above evaluate\.prefix_frames=24"),
        ("evaluate.budgets=[23]", r"evaluate\.budgets must hold sink and recent frames, 24 tokens"),
        ("trainer.devices=2", r"trainer\.strategy=single runs one process"),
        ("trainer.devices=-1", r"trainer\.devices must not be negative, found -1"),
        ("trainer.hang_seconds=-1", r"trainer\.hang_seconds must not be negative, found -1"),
        ("trainer.silence_seconds=0", r"trainer\.silence_seconds must be above 0, found 0"),
        ("trainer.zero_stage=4", r"trainer\.zero_stage must be 0, 1, 2 or 3, found 4"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_to_do(base, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config([base, override])


@pytest.mark.parametrize("name", ["data", "evaluate", "report", "superseded", "Teacher", "a b"])
def test_a_stage_cannot_take_the_name_of_another_folder_of_the_run(name, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(f"name: x\nstages:\n  {name}: {{kind: t, steps: 1, batch: 1, frames: 1}}\n")
    with pytest.raises(ConfigError, match="a stage name must be"):
        load_config([str(path)])


def test_an_input_may_be_the_path_of_an_export(base):
    config = load_config([base, "stages.causal.inputs.teacher=runs/other/teacher"])
    assert config.stages["causal"].inputs == {"teacher": "runs/other/teacher"}


def test_a_missing_file_is_named_with_the_nearest_one(base):
    with pytest.raises(ConfigError, match=r"base\.yml' must exist.*did you mean '.*base\.yaml'"):
        load_config([base.replace(".yaml", ".yml")])


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "a: b: c\n"])
def test_a_file_that_is_no_mapping_is_named(content, tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"odd\.yaml"):
        load_config([str(path)])


def test_a_run_needs_a_name():
    with pytest.raises(ConfigError, match="'name' must be set, found no value"):
        load_config(["seed=1"])


def test_every_config_error_is_a_user_error():
    assert issubclass(ConfigError, UserError)


def test_hashes_depend_on_values_and_not_on_the_order_of_keys(base):
    assert config_hash({"a": 1, "b": [2, {"c": 3}]}) == config_hash({"b": [2, {"c": 3}], "a": 1})
    assert config_hash(load_config([base])) == config_hash(to_dict(load_config([base])))
    assert config_hash(load_config([base])) != config_hash(load_config([base, "seed=4"]))


@dataclass
class Inner:
    depth: int = 1


@dataclass
class Params:
    rate: float
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigError("rate must not be negative")


def test_a_section_is_filled_and_checked_by_its_own_dataclass():
    assert parse_section(Params, {"rate": 2, "inner": {"depth": 4}}, key="p") == Params(2, Inner(4))
    with pytest.raises(ConfigError, match=r"p: 'inner\.dept' is not.*did you mean 'depth'"):
        parse_section(Params, {"rate": 2, "inner": {"dept": 4}}, key="p")
    with pytest.raises(ConfigError, match="p: 'rate' must be set"):
        parse_section(Params, {}, key="p")
    with pytest.raises(ConfigError, match="rate must not be negative"):
        parse_section(Params, {"rate": -1.0}, key="p")


def test_only_close_words_are_suggested():
    assert nearest("ecode", ["encode", "ingest"]) == "; did you mean 'encode'?"
    assert nearest("zzz", ["encode", "ingest"]) == ""


WAN = ["codec.name=wan", "codec.stride=8", "codec.time_stride=4", "evaluate.stages=[]"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source.frames=72"], r"must be 1 \+ n x codec\.time_stride = .* 4, found 72; take 73"),
        (
            ["source.frames=73", "stages.teacher.frames=20"],
            r"stages\.teacher\.frames must not be above the 19 latent frames .*found 20",
        ),
        (["source.frames=189", "evaluate.stages=[causal]"], r"evaluate\.stages must be empty"),
    ],
)
def test_frames_are_counted_in_latent_frames_of_the_codec(base, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config([base, *WAN, *overrides])


def test_the_first_latent_frame_stands_for_one_pixel_frame_and_each_later_one_for_the_stride(base):
    codec = load_config([base, *WAN, "source.frames=189"]).codec
    pairs = [(1, 1), (5, 2), (9, 3), (81, 21), (189, 48)]
    assert [codec.latent_frames(pixels) for pixels, _ in pairs] == [latents for _, latents in pairs]
    assert [codec.pixel_frames(latents) for _, latents in pairs] == [pixels for pixels, _ in pairs]
    with pytest.raises(ConfigError, match=r"source\.frames must be 1 \+ n .*found 0; take 1"):
        codec.latent_frames(0)

"""Alarms are told from made-up curves, once per event, and continue after a resume."""

import json
import logging
import random

import pytest

from configs.errors import ConfigError
from configs.schema import TrackingConfig
from tests.train.toy import toy_config, toy_stage, train
from train.alarms import Windows, find_alarms

FACTOR, LENGTH = 4.0, 5


def curves(**losses):
    """Rows with these losses."""
    return [
        {f"loss/{name}": value for name, value in zip(losses, values, strict=True)}
        for values in zip(*losses.values(), strict=True)
    ]


def alarms(rows, factor=FACTOR, length=LENGTH):
    return find_alarms(rows, factor=factor, length=length)


def noisy(level, count, seed, spread=0.5):
    source = random.Random(seed)
    return [level * source.uniform(1 - spread, 1 + spread) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_noise_around_a_level_is_no_alarm(seed):
    rows = curves(student=noisy(1.0, 300, seed), critic=noisy(0.1, 300, seed + 100))
    assert not any(alarms(rows[:count]) for count in range(1, 301, 7))


def test_a_loss_that_falls_is_no_alarm_however_far():
    falling = [0.8**step for step in range(60)]
    assert alarms(curves(student=[1.0] * 60, critic=falling)) == {}
    assert alarms(curves(teacher=falling)) == {}


def test_growth_by_ten_is_an_alarm_that_names_both_losses():
    rows = curves(student=[1.0] * 10 + [10.0] * 5, critic=[0.2] * 15)
    found = alarms(rows)
    assert list(found) == ["student"]
    assert found["student"].then == pytest.approx({"student": 1.0, "critic": 0.2})
    assert found["student"].now == pytest.approx({"student": 10.0, "critic": 0.2})
    text = found["student"].text(150)
    assert "at step 150, 'student' moves up: critic 0.2 -> 0.2, student 1 -> 10" in text


def test_a_collapse_counts_as_much_as_the_growth_of_the_other():
    def both(growth, fall):
        student = [1.0] * 10 + [growth] * 5
        return list(alarms(curves(student=student, critic=[1.0] * 10 + [1 / fall] * 5)))

    assert both(2.1, 100) == ["student"]  # 2.1 x 2.1 > 4
    assert both(1.9, 100) == []  # 1.9 x 1.9 < 4
    assert both(3.0, 1.4) == ["student"]  # 3 x 1.4 > 4
    assert both(3.0, 1.3) == []
    assert both(3.0, 0.5) == []  # both grow
    assert both(4.1, 0.5) == ["student"]


def test_fewer_rows_than_two_windows_are_no_alarm_and_one_more_is():
    student = [1.0] * 5 + [10.0] * 5
    assert alarms(curves(student=student[:9])) == {}
    assert list(alarms(curves(student=student))) == ["student"]


def test_rows_without_every_loss_or_with_an_undefined_one_do_not_count():
    rows = curves(student=[1.0] * 5 + [10.0] * 5, critic=[1.0] * 10)
    between = [{"loss/critic": 9.0}, {"loss/critic": 1.0, "loss/student": None}, {"other": 1.0}]
    mixed = [row for pair in zip(rows, between * 4, strict=False) for row in pair]
    assert alarms(mixed) == alarms(rows)


def slow_alarms(rows, *, factor, length):
    """The rule as it reads: all windows of all rows, anew."""
    names = sorted({key for row in rows for key in row if key.startswith("loss/")})
    whole = [row for row in rows if all(row.get(name) is not None for name in names)]
    sums = [dict.fromkeys(names, 0.0)]
    for row in whole:
        sums.append({name: sums[-1][name] + row[name] for name in names})
    windows = [
        {name: (sums[end][name] - sums[end - length][name]) / length for name in names}
        for end in range(length, len(sums))
    ]
    found = {}
    for name in names:
        earlier = [window for window in windows[:-length] if window[name] > 0]
        if earlier:
            then, now = min(earlier, key=lambda window: window[name]), windows[-1]
            growth = now[name] / then[name]
            falls = [then[key] / now[key] for key in names if key != name and now[key] > 0]
            if growth * max(1.0, min(growth, max(falls, default=1.0))) > factor:
                found[name.removeprefix("loss/")] = [
                    {key.removeprefix("loss/"): mean for key, mean in window.items()}
                    for window in (then, now)
                ]
    return found


def random_rows(source):
    """Losses that wander, some below zero, with gaps; one begins late or never."""
    levels = {name: source.choice([1.0, 1.0, 0.0]) for name in ("critic", "student", "teacher")}
    late = source.choice([0, 20, 200])
    for number in range(120):
        for name in levels:
            levels[name] = levels[name] * source.uniform(0.7, 1.5) + source.uniform(-0.02, 0.02)
        row = {f"loss/{name}": level for name, level in levels.items() if name != "teacher"}
        row |= {"loss/teacher": levels["teacher"]} if number >= late else {}
        if source.random() < 0.1:
            row[source.choice(list(row))] = None
        if source.random() < 0.1:
            del row[source.choice(list(row))]
        yield row | {"other": 1.0}


def test_row_after_row_the_alarms_are_those_of_all_rows_together():
    seen = 0
    for seed in range(40):
        source = random.Random(seed)
        rows, length = list(random_rows(source)), source.choice([1, 2, 5, 9])
        windows = Windows(length)
        for count, row in enumerate(rows, start=1):
            windows.add(row)
            found = windows.alarms(FACTOR)
            expected = slow_alarms(rows[:count], factor=FACTOR, length=length)
            assert {name: [a.then, a.now] for name, a in found.items()} == expected
            seen += len(found)
        assert list(found) == list(expected)
    assert 100 < seen < 40 * 120 * 2


def test_a_loss_that_is_not_finite_counts_no_more_now_than_it_does_in_the_file():
    rows = curves(student=[1.0] * 5 + [10.0] * 5)
    assert alarms([*rows, {"loss/student": float("inf")}]) == alarms(rows)
    assert alarms([{"loss/student": float("nan")}, *rows]) == alarms(rows)


def train_with_losses(folder, losses, *, steps):
    """A toy run, one row per step, whose reported critic losses are made up."""
    config = toy_config(steps=steps, log_every=1, checkpoint_every=1)
    config.tracking = TrackingConfig(wandb="disabled", alarm_factor=4.0, alarm_rows=2)
    config.stages["toy"].steps = len(losses)
    stage = toy_stage(config)
    own = stage.update

    def update(batch, step):
        if step == steps:
            raise ZeroDivisionError
        return own(batch, step) | {"loss/critic": losses[step], "loss/student": 1.0}

    stage.update = update
    train(folder, config, stage)


def announced(caplog):
    messages = [record.message for record in caplog.records]
    return [message.split(",")[0] for message in messages if "diverge" in message]


def test_an_alarm_is_told_once_until_it_has_gone_and_a_resume_knows(tmp_path, caplog):
    losses = [1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 1.0, 1.0, 9.0, 9.0]
    with caplog.at_level(logging.WARNING):
        train_with_losses(tmp_path / "whole", losses, steps=10)
    told = [
        record.message.split(",")[0] for record in caplog.records if "diverge" in record.message
    ]
    assert told == ["the losses diverge at step 4", "the losses diverge at step 9"]
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").open()]
    assert [row["step"] for row in rows if row.get("alarm/critic") == 1.0] == [4, 5, 6, 7, 9, 10]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        with pytest.raises(ZeroDivisionError):
            train_with_losses(tmp_path / "cut", losses, steps=5)
        train_with_losses(tmp_path / "cut", losses, steps=10)
    again = [
        record.message.split(",")[0] for record in caplog.records if "diverge" in record.message
    ]
    assert again == told
    found = [json.loads(line) for line in (tmp_path / "cut/metrics.jsonl").open()]
    assert [row.get("alarm/critic") for row in found] == [row.get("alarm/critic") for row in rows]


@pytest.mark.parametrize("change", [{"alarm_factor": 0.0}, {"alarm_rows": 0}])
def test_zero_turns_alarms_off(tmp_path, change):
    config = toy_config(steps=3, log_every=1)
    config.tracking = TrackingConfig(wandb="disabled", **change)
    stage = toy_stage(config)
    train(tmp_path, config, stage)
    assert stage.watch_row is None


@pytest.mark.parametrize(
    ("change", "message"),
    [({"alarm_factor": 0.5}, "alarm_factor must be above 1"), ({"alarm_rows": -1}, "alarm_rows")],
)
def test_settings_of_alarms_that_cannot_be_meant_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        TrackingConfig(**change)

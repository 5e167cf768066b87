"""RefreshConfig, Simulation, and settings from YAML and overrides: bad values get one line that names them."""

import dataclasses
import json
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch

from refreshkv import NEVER, RefreshConfig, Simulation
from refreshkv.options import Overrides, changed_config
from refreshkv.settings import SettingsError, load_settings, save_settings, settings_from_dict, settings_to_dict


def refusal(call, *arguments, **settings):
    """The message of the `SettingsError` that the call raises: one line."""
    with pytest.raises(SettingsError) as caught:
        call(*arguments, **settings)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---- RefreshConfig and Simulation


def test_the_defaults_are_the_paper_settings():
    assert RefreshConfig().to_dict() == {
        "budget": 0.125,
        "stride": 10,
        "threshold": None,
        "pool_kernel": 7,
        "observation_window": 1,
        "recent_window": 0,
        "sink_tokens": 0,
        "select_stride": None,
        "score_bits": 16,
        "pool_ahead": False,
        "rectify": False,
    }


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("budget", [0, -3, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, None, "8", 2**31]),
        ("stride", [0, -1, 2.0, True, None, "5"]),
        ("threshold", [float("nan"), float("inf"), True, "0.8"]),
        ("pool_kernel", [0, 2, 8, -7, 3.0, True]),
        ("observation_window", [0, -1, 1.0, True]),
        ("recent_window", [-1, 1.0, True, None]),
        ("sink_tokens", [-1, 1.0, True, None]),
        ("select_stride", [0, -1, 2.0, True, "2"]),
        ("score_bits", [0, 5, 32, True, None, "4"]),
        ("pool_ahead", [1, 0, None, "yes"]),
        ("rectify", [1, 0, None, "yes"]),
    ],
)
def test_bad_values_are_refused_by_name(name, values):
    for value in values:
        message = refusal(RefreshConfig, **{name: value})
        assert name in message and repr(value) in message


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "5"])
def test_a_simulation_needs_a_prompt(value):
    assert refusal(Simulation, value) == f"prompt_length must be a whole number >= 1, got {value!r}"


def test_config_errors_are_value_errors():
    with pytest.raises(ValueError, match="stride"):
        RefreshConfig(stride=0)


def test_configs_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RefreshConfig().stride = 5
    assert dataclasses.replace(RefreshConfig(), stride=5) == RefreshConfig(stride=5)


@pytest.mark.parametrize(
    "config",
    [
        RefreshConfig(),
        RefreshConfig(budget=2048, stride=NEVER),
        RefreshConfig(budget=1.0, threshold=0.85),
        RefreshConfig(budget=1, threshold=-1, pool_kernel=1, observation_window=16, recent_window=128, sink_tokens=4),
        RefreshConfig(stride=NEVER, select_stride=2, score_bits=4, pool_ahead=True, pool_kernel=10),
        RefreshConfig(stride=5, rectify=True),
    ],
)
def test_configs_survive_json(config):
    read = RefreshConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert read == config and type(read.budget) is type(config.budget)


def test_score_bits_without_selecting_steps_are_refused():
    message = refusal(RefreshConfig, score_bits=4)
    assert message == "score_bits=4 means nothing without selecting steps: set select_stride, or score_bits=16"


def test_rectified_steps_need_the_fixed_schedule():
    message = refusal(RefreshConfig, rectify=True, threshold=0.5)
    assert message.startswith("rectify=True needs the fixed schedule") and "threshold=None" in message


def test_a_config_saved_before_there_were_selecting_steps_loads():
    new = ("select_stride", "score_bits", "pool_ahead", "rectify")
    saved = {name: value for name, value in RefreshConfig(budget=64).to_dict().items() if name not in new}
    assert RefreshConfig.from_dict(saved) == RefreshConfig(budget=64)


def test_the_recommended_settings():
    config = RefreshConfig.recommended()
    assert config.to_dict() == {
        "budget": 0.125,
        "stride": "never",
        "threshold": None,
        "pool_kernel": None,
        "observation_window": 1,
        "recent_window": 0,
        "sink_tokens": 0,
        "select_stride": 1,
        "score_bits": 4,
        "pool_ahead": True,
        "rectify": False,
    }
    changed = RefreshConfig.recommended(budget=64, select_stride=3, stride=10)
    assert changed == dataclasses.replace(config, budget=64, select_stride=3, stride=10)
    assert RefreshConfig.from_dict("recommended") == RefreshConfig.from_dict({"preset": "recommended"}) == config
    assert RefreshConfig.from_dict("paper") == RefreshConfig()
    assert RefreshConfig.from_dict(config.to_dict()) == config


def test_pooling_over_the_steps_that_a_selection_serves():
    """pool_kernel=None: `select_stride`, or else `stride`; one step of a selection that is never renewed."""

    def width(**settings):
        return RefreshConfig(pool_ahead=True, pool_kernel=None, **settings).selection_options().pool_kernel

    assert (width(), width(stride=7), width(stride=NEVER)) == (10, 7, 1)
    assert [width(stride=NEVER, select_stride=stride) for stride in (1, 2, 5)] == [1, 2, 5]
    assert width(stride=10, select_stride=3) == 3
    assert RefreshConfig.recommended(select_stride=2).selection_options().pool_kernel == 2
    assert "pool_kernel must be odd" in refusal(RefreshConfig, pool_kernel=None)


def test_presets_in_files_and_on_command_lines(tmp_path):
    config, path = RefreshConfig.recommended(budget=64), tmp_path / "run.yaml"
    for text in ("refresh: {preset: recommended, budget: 64}", "refresh: {budget: 64, preset: recommended}"):
        path.write_text(text)
        assert load_settings(Overrides, path).refresh == config
    path.write_text("refresh: recommended")
    assert load_settings(Overrides, path).refresh == RefreshConfig.recommended()
    assert load_settings(Overrides, path, ["refresh.budget=64"]).refresh == config
    path.write_text("refresh: {budget: 64, sink_tokens: 3}")
    assert load_settings(Overrides, path, ["refresh=recommended"]).refresh == RefreshConfig.recommended()
    for value in ("best", "{preset: 3}", "{preset: null}"):
        path.write_text(f"refresh: {value}")
        message = refusal(load_settings, Overrides, path)
        assert message.startswith("refresh: there is no preset") and "known are paper, recommended" in message
    path.write_text("refresh: 3")
    assert "refresh must be a section with keys" in refusal(load_settings, Overrides, path)


def test_a_preset_replaces_the_models_own_settings_but_not_the_flags():
    own, recommended = RefreshConfig(budget=32, sink_tokens=4), RefreshConfig.recommended()
    assert changed_config(own, ["refresh=recommended"]) == recommended
    wanted = dataclasses.replace(recommended, budget=0.5, select_stride=3)
    for overrides in (
        ["refresh=recommended", "refresh.select_stride=3"],
        ["refresh.select_stride=3", "refresh=recommended"],
    ):
        assert changed_config(own, overrides, budget="0.5", threshold=None) == wanted
    assert changed_config(own, ["refresh.sink_tokens=5"]) == dataclasses.replace(own, sink_tokens=5)
    assert "refresh: there is no preset 'best'" in refusal(changed_config, own, ["refresh=best"])


def test_never_has_a_name_in_files():
    config = RefreshConfig(stride=NEVER)
    assert config.to_dict()["stride"] == "never"
    for written in ("never", "Never", "NEVER", NEVER):
        assert RefreshConfig.from_dict({"stride": written}) == RefreshConfig(stride=written) == config


def test_a_budget_in_percent():
    for written, share in (("12.5%", 0.125), ("100%", 1.0), (" 7 % ", 0.07)):
        found = RefreshConfig.from_dict({"budget": written})
        assert found == RefreshConfig(budget=written) and found.budget == pytest.approx(share)
        assert isinstance(found.budget, float)
    assert "budget must be a number or a text such as" in refusal(RefreshConfig, budget="some%")
    assert "budget=1.5 is a fraction of the prompt" in refusal(RefreshConfig, budget="150%")


def test_one_token_is_not_all_of_them_unnoticed():
    with pytest.warns(UserWarning, match=r'budget=1 keeps one token; for all of the prompt write 1.0 or "100%"'):
        RefreshConfig(budget=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RefreshConfig(budget=1.0)
        RefreshConfig(budget=2)


def test_a_saved_config_may_leave_settings_out():
    assert RefreshConfig.from_dict({"budget": 64}) == RefreshConfig(budget=64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budjet": 8}, "unknown setting refreshkv.budjet; did you mean refreshkv.budget?"),
        ({"zzz": 8}, "unknown setting refreshkv.zzz; known here: budget, stride, threshold"),
        ({"stride": "often"}, "refreshkv.stride must be a whole number, got 'often'"),
        ({"budget": "half"}, "refreshkv.budget must be a whole number or a number, got 'half'"),
        ({"stride": 0}, "stride must be a whole number >= 1, got 0"),
        ([], "refreshkv must be a section with keys, got []"),
    ],
)
def test_a_saved_config_is_read_strictly(values, message):
    assert message in refusal(RefreshConfig.from_dict, values)


def test_budgets_in_tokens_and_as_a_fraction():
    lengths = torch.tensor([1, 8, 9, 1000])
    assert RefreshConfig(budget=0.125).budgets(lengths).tolist() == [1, 1, 2, 125]
    assert RefreshConfig(budget=1.0).budgets(lengths).tolist() == lengths.tolist()
    assert RefreshConfig(budget=7).budgets(lengths).tolist() == [7, 7, 7, 7]
    for budget in (0.125, 0.1, 1 / 3, 0.7, 1.0, 7):
        config, lengths = RefreshConfig(budget=budget), torch.arange(1, 400)
        assert config.budgets(lengths).tolist() == [config.largest_budget(length) for length in lengths.tolist()]


# ---- settings files


@dataclass
class Inner:
    rate: float = 0.5
    steps: int | list[int] = 10
    folder: str | None = None
    exact: bool = False


@dataclass
class Whole:
    kind: Literal["one", "two", "off"] = "one"
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    extra: dict[str, Any] = field(default_factory=dict)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)


def written(folder, text):
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def test_without_a_file_there_are_defaults_and_overrides():
    assert load_settings(Whole) == Whole()
    loaded = load_settings(Whole, overrides=["kind=two", "inner.steps=[1, 2]", "inner.folder=a=b", "betas=[0, 1]"])
    assert loaded == Whole(kind="two", inner=Inner(steps=[1, 2], folder="a=b"), betas=[0.0, 1.0])
    assert (
        load_settings(Whole, overrides=["kind=off"]).kind
        == load_settings(Whole, overrides=["kind='off'"]).kind
        == "off"
    )


def test_a_file_with_sections_and_overrides_on_top(tmp_path):
    path = written(
        tmp_path,
        """
        kind: two
        inner: {rate: 5e-6, steps: [3, 4], exact: true}
        other: {folder: here}
        extra: {any: {thing: 1}}
        refresh: {budget: 0.25, threshold: 0.85}
        """,
    )
    expected = Whole(
        kind="two",
        inner=Inner(5e-6, [3, 4], exact=True),
        other=Inner(folder="here"),
        extra={"any": {"thing": 1}},
        refresh=RefreshConfig(budget=0.25, threshold=0.85),
    )
    assert load_settings(Whole, path) == expected
    changed = load_settings(
        Whole, path, ["inner.steps=7", "refresh.threshold=null", "other.rate=1", "refresh.budget=64"]
    )
    assert changed.inner == Inner(5e-6, 7, exact=True)
    assert changed.refresh == RefreshConfig(budget=64)
    assert changed.other == Inner(rate=1.0, folder="here") and isinstance(changed.other.rate, float)


@pytest.mark.parametrize("text", ["5e-6", "5.0e-6", "0.000005", "5E-06"])
def test_small_numbers_in_any_spelling(text, tmp_path):
    """To YAML, 5e-6 is a text."""
    assert load_settings(Inner, overrides=[f"rate={text}"]).rate == 5e-6
    assert load_settings(Inner, written(tmp_path, f"rate: {text}")).rate == 5e-6


def test_an_empty_file_is_all_defaults(tmp_path):
    assert load_settings(Whole, written(tmp_path, "# nothing yet\n")) == Whole()


def test_settings_are_read_back_as_they_were_saved(tmp_path):
    settings = Whole("two", Inner(5e-6, [1], "größe"), refresh=RefreshConfig(budget=1.0, threshold=-0.5))
    save_settings(settings, tmp_path / "saved.yaml")
    assert load_settings(Whole, tmp_path / "saved.yaml") == settings
    assert settings_from_dict(Whole, settings_to_dict(settings)) == settings
    assert (tmp_path / "saved.yaml").read_text().startswith("kind: two\ninner:\n")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kinds=one", "unknown setting kinds; did you mean kind?"),
        ("inner.stepz=1", "unknown setting inner.stepz; did you mean inner.steps?"),
        ("inner.zzz=1", "unknown setting inner.zzz; known here: rate, steps, folder, exact"),
        ("other.rat=1", "unknown setting other.rat; did you mean other.rate?"),
        ("kind=three", "kind must be one of one, two, off, got 'three'"),
        ("inner.rate=fast", "inner.rate must be a number, got 'fast'"),
        ("inner.rate=true", "inner.rate must be a number, got True"),
        ("inner.rate=", "inner.rate must be a number, got None"),
        ("inner.steps=2.5", "inner.steps must be a whole number or a list (each a whole number), got 2.5"),
        ("inner.steps=[1, x]", "inner.steps must be a whole number or a list (each a whole number), got [1, 'x']"),
        ("inner.folder=3", "inner.folder must be text or null, got 3"),
        ("inner.exact=1", "inner.exact must be true or false, got 1"),
        ("betas=[0.9, x]", "betas[1] must be a number, got 'x'"),
        ("betas=0.9", "betas must be a list (each a number), got 0.9"),
        ("extra=3", "extra must be a section with keys, got 3"),
        ("inner=3", "inner must be a section with keys, got 3"),
        ("refresh.stride=0", "stride must be a whole number >= 1, got 0"),
        ("kind.one=3", "kind must be one of one, two, off, got {'one': 3}"),
        ("inner.rate.deep=3", "inner.rate must be a number, got {'deep': 3}"),
        ("kind", "cannot read 'kind': overrides are written section.key=value"),
        ("=one", "cannot read '=one'"),
        ("betas=[1, 2", "cannot read the value of 'betas=[1, 2' as YAML; quote it"),
    ],
)
def test_bad_overrides_are_refused_by_name(override, message):
    assert message in refusal(load_settings, Whole, None, [override])


def test_an_override_does_not_reach_into_a_value(tmp_path):
    path = written(tmp_path, "inner: {rate: 1.0}")
    assert "cannot set inner.rate.deep: rate is a value" in refusal(load_settings, Whole, path, ["inner.rate.deep=3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: [one", "is not readable YAML"),
        ("kind: one\n\tinner: 3", "is not readable YAML"),
        ("- kind\n- inner", "must hold sections with keys, got list"),
        ("just a text", "must hold sections with keys, got str"),
        ("inner:\n  stepz: 3", "unknown setting inner.stepz; did you mean inner.steps?"),
        ("inner:", "inner must be a section with keys, got None"),
        ("3: 4", "unknown setting 3"),
    ],
)
def test_bad_files_are_refused_in_one_line(text, message, tmp_path):
    assert message in refusal(load_settings, Whole, written(tmp_path, text))


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    assert refusal(load_settings, Whole, tmp_path / "nowhere.yaml").startswith("--config: there is no file ")
    assert refusal(load_settings, Whole, tmp_path) == f"--config: {tmp_path} is a folder, not a file"
    (tmp_path / "bytes.yaml").write_bytes(b"kind: \xff\xfe")
    assert "bytes.yaml is not UTF-8 text (byte 6 is 0xff)" in refusal(load_settings, Whole, tmp_path / "bytes.yaml")

"""The config loader: what it reads, and what it says about each mistake."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from posttrain.config import Config, digest, dump, load, merge
from posttrain.errors import ConfigError


class Mode(StrEnum):
    FAST = "fast"
    SLOW = "slow"


class Local(Config):
    type: Literal["local"] = "local"
    slots: int = 8
    """Sequences decoded at once."""


class Vllm(Config):
    type: Literal["vllm"]
    url: str
    """Where the server answers."""


class Train(Config):
    lr: float
    """Learning rate of AdamW."""
    steps: int = Field(default=3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float | int | None = None


class World(Config):
    names: tuple[str, ...] = ()
    share: float = 1.0


Engine = Annotated[Local | Vllm, Field(discriminator="type")]


class Top(Config):
    seed: int = 0
    train: Train
    engine: Engine = Local()
    spare: Engine | None = None
    engines: dict[str, Engine] = Field(default_factory=dict)
    worlds: dict[str, World] = Field(default_factory=dict)
    chain: tuple[World, ...] = ()
    mode: Mode = Mode.FAST
    text: str = ""
    folder: Path = Path(".")
    color: Literal["red", "green"] = "red"

    @model_validator(mode="after")
    def _agree(self) -> Top:
        if self.seed == 13:
            raise ValueError("seed 13 is unlucky; take another")
        return self


GOOD = "train:\n  lr: 1e-3\n"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "c.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def message(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(Top, write(text), overrides)
    return str(caught.value)


# What it reads


def test_values_of_every_kind() -> None:
    config = load(
        Top,
        write(
            "seed: 3\ntrain: {lr: 1, betas: [0, 0.5]}\nengine: {type: vllm, url: 'http://x'}\n"
            "engines: {a: {type: local, slots: 2}}\nworlds: {w: {names: [x, y]}}\nmode: slow\nfolder: a/b\n"
            "text: 2026-01-02\n"
        ),
    )
    assert config.train == Train(lr=1.0, betas=(0.0, 0.5))
    assert isinstance(config.train.lr, float)
    assert config.engine == Vllm(type="vllm", url="http://x")
    assert config.engines == {"a": Local(slots=2)}
    assert config.worlds["w"].names == ("x", "y")
    assert (config.mode, config.folder, config.text) == (Mode.SLOW, Path("a/b"), "2026-01-02")
    with pytest.raises(Exception, match="frozen"):
        config.seed = 4  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("-2E3", -2e3), (".5e1", 5.0), ("1_0.5e+1", 105.0)])
def test_exponents_are_numbers(text: str, value: float) -> None:
    assert load(Top, write(f"train: {{lr: {text}}}")).train.lr == value


def test_descriptions_come_from_docstrings() -> None:
    assert Train.model_fields["lr"].description == "Learning rate of AdamW."


def test_extends_merges_mappings_and_replaces_lists() -> None:
    write("train: {lr: 0.1, steps: 5}\nchain: [{share: 1}, {share: 2}]\nworlds: {a: {share: 1}}\n", "base/b.yaml")
    write("extends: ../base/b.yaml\nseed: 1\ntrain: {lr: 0.2}\n", "mid/m.yaml")
    config = load(Top, write("extends: mid/m.yaml\nchain: [{share: 3}]\nworlds: {b: {share: 2}}\n"))
    assert config.train == Train(lr=0.2, steps=5)
    assert config.seed == 1
    assert config.chain == (World(share=3.0),)
    assert config.worlds == {"a": World(share=1.0), "b": World(share=2.0)}


def test_another_type_starts_afresh() -> None:
    write(GOOD + "engine: {type: local, slots: 3}\n", "b.yaml")
    path = write("extends: b.yaml\nengine: {type: vllm, url: u}\n")
    assert load(Top, path).engine == Vllm(type="vllm", url="u")
    assert load(Top, path, ["engine.type=local"]).engine == Local()
    # In any order of the --set.
    assert load(Top, "b.yaml", ["engine.url=v", "engine.type=vllm"]).engine == Vllm(type="vllm", url="v")


def test_set_takes_yaml_and_the_last_wins() -> None:
    overrides = [
        "seed=4",
        "seed=5",
        "train.betas=[0.1, 0.2]",
        "engine={type: local, slots: 2}",
        "text=a=b",
        "worlds.w.share=0.5",
    ]
    config = load(Top, write(GOOD), overrides)
    assert (config.seed, config.train.betas, config.engine) == (5, (0.1, 0.2), Local(slots=2))
    assert config.text == "a=b"
    assert config.worlds == {"w": World(share=0.5)}
    assert load(Top, "c.yaml", ["spare={type: vllm, url: x}"]).spare == Vllm(type="vllm", url="x")


def test_anchors_and_merge_keys() -> None:
    config = load(
        Top, write("train: &t {lr: 1}\nworlds:\n  a: &w {share: 0.5, names: [n]}\n  b: {<<: *w, share: 0.25}\n")
    )
    assert config.worlds["b"] == World(share=0.25, names=("n",))


# What it says


def test_unknown_key_names_the_nearest() -> None:
    assert message("train:\n  lr: 1\n  stps: 4\n") == (
        "c.yaml, line 3: unknown key `train.stps`. Did you mean `train.steps`? "
        "Valid keys there: train.lr, train.steps, train.betas, train.warmup."
    )


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("engine: {type: local, slts: 1}", "unknown key `engine.slts`. Did you mean `engine.slots`?"),
        ("spare: {type: local, slts: 1}", "unknown key `spare.slts`. Did you mean `spare.slots`?"),
        ("engines: {a: {type: vllm, url: x, ur: 1}}", "unknown key `engines.a.ur`. Did you mean `engines.a.url`?"),
        ("worlds: {w: {shar: 1}}", "unknown key `worlds.w.shar`. Did you mean `worlds.w.share`?"),
        ("chain: [{}, {shar: 1}]", "unknown key `chain.1.shar`. Did you mean `chain.1.share`?"),
    ],
)
def test_unknown_key_deep_inside(text: str, where: str) -> None:
    assert message(f"{GOOD}{text}\n").startswith(f"c.yaml, line 3: {where}")


def test_the_file_that_holds_the_mistake_is_named() -> None:
    write("train:\n  lr: x\n", "b.yaml")
    assert message("extends: b.yaml\nseed: 1\n").startswith("b.yaml, line 2: `train.lr` must be a number")
    assert message("extends: b.yaml\ntrain: {lr: y}\n").startswith("c.yaml, line 2: `train.lr` must be a number")


def test_a_mistake_on_the_command_line_is_said_to_be_there() -> None:
    assert message(GOOD, "train.lr=fast").startswith("--set train.lr=fast: `train.lr` must be a number, it is the text")
    assert message(GOOD, "trian.lr=1").startswith("--set trian.lr=1: unknown key `trian`. Did you mean `train`?")
    assert message(GOOD, "seed.x=1").startswith("--set seed.x=1: `seed` must be a whole number, it is a mapping.")
    assert message(GOOD, "engine.type=vllm").startswith(
        "--set engine.type=vllm: the key `engine.url` is missing (text;"
    )
    assert "--set chain='[...]'" in message(GOOD, "chain.0.share=1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: '1'", "`seed` must be a whole number, it is the text '1'. Write a number, without quotes"),
        ("seed: 1.5", "`seed` must be a whole number, it is the number 1.5."),
        ("seed: true", "`seed` must be a whole number, it is true."),
        ("seed: .nan", "`seed` must be a"),
        ("text: off", "`text` must be text, it is false. Put the value in quotes."),
        ("engine: 5", "`engine` must be a mapping, it is the number 5. Write its keys below it: type, slots"),
        ("worlds: [1]", "`worlds` must be a mapping, it is a list."),
        ("chain: x", "`chain` must be a list, it is the text 'x'."),
        ("mode: fst", "`mode` must be one of 'fast' or 'slow', it is the text 'fst'."),
        ("color: grene", "`color` must be one of 'red' or 'green', it is the text 'grene'. Did you mean 'green'?"),
        ("engine: {type: vlm}", "unknown type 'vlm' for `engine`. Did you mean 'vllm'? Valid types: local, vllm."),
        ("spare: {slots: 1}", "`spare` needs the key `type`, one of: local, vllm."),
        ("engines: {a: {type: x}}", "unknown type 'x' for `engines.a`. Valid types: local, vllm."),
        ("seed: 13", "seed 13 is unlucky; take another."),
        ("worlds: {1: {}}", "a key under `worlds` is not text; put it in quotes."),
        ("seed: !!binary aGk=", "`seed` has the tag tag:yaml.org,2002:binary; only plain values are allowed."),
        ("worlds: &w {a: *w}", "`worlds.a` contains itself; write it out."),
    ],
)
def test_wrong_values(text: str, said: str) -> None:
    assert said in message(f"{GOOD}{text}\n")


def test_wrong_value_in_a_constrained_or_plain_union_field() -> None:
    said = message("train: {lr: .inf, steps: 0, warmup: x}\n").splitlines()
    assert said[0] == "c.yaml, line 1: `train.lr` must be a finite number, it is the number inf. Change the value."
    assert said[1].startswith("c.yaml, line 1: `train.steps` should be greater than 0, it is the number 0.")
    assert said[2].startswith("c.yaml, line 1: `train.warmup` must be a number or a whole number, it is the text 'x'.")


def test_missing_key() -> None:
    assert message("train:\n  steps: 2\n") == (
        "c.yaml, line 1: the key `train.lr` is missing (a number; Learning rate of AdamW). "
        "Add it under `train` or give --set train.lr=VALUE."
    )
    assert message("seed: 1\n") == (
        "c.yaml: the key `train` is missing (a mapping). Add it at the top level or give --set train=VALUE."
    )


def test_many_mistakes_are_cut() -> None:
    said = message("".join(f"k{i}: 1\n" for i in range(20)) + GOOD).splitlines()
    assert len(said) == 9
    assert said[-1] == "... and 12 more mistakes."


def test_files_that_are_not_there() -> None:
    write(GOOD, "configs/tiny/a.yaml")
    for path, said in [
        ("configs/tiny/b.yaml", "there is no such file. There are: configs/tiny/a.yaml."),
        ("configs/tiny", "is a directory, not a file. There are: configs/tiny/a.yaml."),
        ("nowhere/b.yaml", "there is no such file. Give the path"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load(Top, path)
        assert str(caught.value).startswith(f"{path}: {said}")


def test_extends_missing_cyclic_or_of_the_wrong_kind() -> None:
    assert message("extends: no.yaml\n").startswith("no.yaml: there is no such file (`extends` in c.yaml).")
    assert message("extends: 5\n").startswith("c.yaml, line 1: `extends` must be the path of one YAML file")
    write("extends: c.yaml\n", "d.yaml")
    assert message("extends: ./d.yaml\n") == (
        "d.yaml: `extends` goes in a circle: c.yaml -> d.yaml -> c.yaml. Remove one of them."
    )
    assert message("extends: c.yaml\n").startswith("c.yaml: `extends` goes in a circle: c.yaml -> c.yaml.")


def test_not_yaml_not_a_mapping_twice_the_same_key() -> None:
    assert message("train: [1,\nlr").startswith("c.yaml, line 2, column 3: not valid YAML:")
    assert message("seed: !!int x").startswith("c.yaml: not valid YAML: invalid literal for int()")
    assert message("a: 1\n---\nb: 1\n").startswith("c.yaml, line 2, column 1: not valid YAML:")
    assert message("- 1").startswith("c.yaml: the top level must be a mapping (`key: value` lines), it is a list.")
    assert message("").endswith("it is empty (null).")
    assert message("[" * 5000).startswith("c.yaml: not valid YAML:")
    assert message("train:\n  lr: 1\n  steps: 2\n  lr: 3\n") == (
        "c.yaml, line 4: the key `train.lr` stands twice (first on line 2); keep one."
    )
    Path("c.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"c.yaml: is not UTF-8 text \(byte 3\)"):
        load(Top, "c.yaml")


@pytest.mark.parametrize("override", ["seed", "=1", "a..b=1", "a b=1", ".a=1", "a.=1", ""])
def test_set_without_key_and_value(override: str) -> None:
    assert message(GOOD, override).startswith(f"--set {override}: is not KEY=VALUE.")


def test_set_with_broken_yaml_or_extends() -> None:
    assert message(GOOD, "seed=[1").startswith("--set seed=[1, line 1, column 3: not valid YAML:")
    assert message(GOOD, "worlds={a: {}, a: {}}").endswith("the key `a` stands twice (first on line 1); keep one.")
    assert message(GOOD, "extends=x.yaml").startswith("--set extends=x.yaml: `extends` belongs in a file.")


# Properties

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.sampled_from(["a", "b", "c"])
trees = st.dictionaries(keys, st.recursive(scalars | st.lists(st.integers()), lambda t: st.dictionaries(keys, t)))


@given(trees)
def test_merge_with_itself_and_with_nothing_changes_nothing(a: dict[str, Any]) -> None:
    assert merge(a, a) == a
    assert merge(a, {}) == merge({}, a) == a


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    out: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        out |= leaves(value, (*path, key)) if isinstance(value, dict) and value else {(*path, key): value}
    return out


def holds(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@given(trees, trees, trees)
def test_merge_keeps_the_top_and_what_it_does_not_touch(
    a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]
) -> None:
    merged = merge(a, b)
    for path, value in leaves(b).items():
        if value != {}:  # an empty mapping adds nothing to one below it
            assert holds(merged, path) == value
    for path, value in leaves(a).items():
        if path[0] not in b:
            assert holds(merged, path) == value
    assert set(merged) == set(a) | set(b)
    assert merge(merged, c) is not merged


@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_dump_loads_back_equal(text: str, seed: int, lr: float) -> None:
    if seed == 13:
        return
    config = Top(
        seed=seed,
        train=Train(lr=lr),
        text=text,
        engines={text: Vllm(type="vllm", url=text)},
        mode=Mode.SLOW,
        folder=Path("a"),
    )
    Path("dumped.yaml").write_text(dump(config), encoding="utf-8", newline="")
    assert load(Top, "dumped.yaml") == config
    assert digest(load(Top, "dumped.yaml")) == digest(config)


@given(st.text(alphabet="0123456789eE+-._:xobnaftruyN~ <=", max_size=8))
def test_any_text_survives_the_dump(text: str) -> None:
    config = Top(train=Train(lr=1.0), text=text)
    Path("dumped.yaml").write_text(dump(config), encoding="utf-8")
    assert load(Top, "dumped.yaml").text == text


@given(st.text(max_size=20), st.text(max_size=20))
def test_an_override_is_taken_or_refused_never_a_traceback(key: str, value: str) -> None:
    Path("c.yaml").write_text(GOOD)
    try:
        load(Top, "c.yaml", [f"{key}={value}"])
    except ConfigError as error:
        assert str(error).startswith("--set ")
    try:
        load(Top, "c.yaml", [f"text={value}"])
    except ConfigError as error:
        assert str(error).startswith("--set text=")


@given(st.text(alphabet="ab:\n -[]{},'\"#&*!|>%@1.", max_size=30))
def test_any_file_is_read_or_refused(text: str) -> None:
    Path("any.yaml").write_text(text)
    with pytest.raises(ConfigError):  # never a valid config: it cannot spell `train`
        load(Top, "any.yaml")


def test_digest() -> None:
    assert digest({"b": 1, "a": [1.5, None]}) == digest({"a": [1.5, None], "b": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({"t": Train(lr=1), "p": Path("x")}) == digest({"t": Train(lr=1.0).model_dump(), "p": "x"})
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    with pytest.raises(TypeError, match="not set"):
        digest({1, 2})

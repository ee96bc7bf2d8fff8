"""Configurations: all shipped ones load; mistakes are named with the nearest key."""

from pathlib import Path

import pytest

from astro_hpc.config import ConfigError, load_config

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "configs" / "demo.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_load(path):
    cfg = load_config(path)
    assert load_config(path).model_dump() == cfg.model_dump()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serch.num_iterations=3", "unknown key serch; did you mean search?"),
        ("search.num_iteration=3", "unknown key search.num_iteration; did you mean num_iterations?"),
        ("rl.objective.clip_lo=1", "unknown key rl.objective.clip_lo; did you mean clip_low?"),
        ("sft.optimizer.learning_rate=1", "unknown key sft.optimizer.learning_rate"),
        ("sft.optimizer.lr=-1", "sft.optimizer.lr: input should be greater than 0, got '-1'"),
        ("problems.train=[{type: signs, count: 3, cuont: 4}]", "did you mean count?"),
        ("eval.benchmarks={a: {type: sings}}", "'signs', 'reasoning_gym', 'jsonl'"),
        ("name=../escape", "name: string should match pattern"),
        ("arms=[]", "arms: list should have at least 1 item"),
        ("warmup.problems=null", "warmup.enabled needs warmup.problems"),
        ("search", "write it as section.key=value"),
        ("name.x=1", "name is not a section"),
        ("search=[", "the value is not YAML"),
    ],
)
def test_mistakes_are_one_line_that_says_how_to_mend(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_are_typed_and_nested():
    cfg = load_config(DEMO, ["sft.optimizer.lr=3e-6", "search.keep_rollouts=false", "model.path=/a/b"])
    assert cfg.sft.optimizer.lr == 3e-6
    assert cfg.search.keep_rollouts is False
    assert cfg.model.path == "/a/b"


def test_the_papers_search():
    """8 next steps, 16 rollouts, 32 iterations, 50 steps deep; nothing of ours changes its tree."""
    search = load_config(ROOT / "configs" / "llama3.1-70b.yaml").search
    assert (search.num_expansions, search.num_rollouts, search.num_iterations, search.max_depth) == (8, 16, 32, 50)
    assert not search.keep_rollouts


def test_base_is_overridden_key_by_key(tmp_path):
    (tmp_path / "a.yaml").write_text(f"base: {DEMO}\nname: mine\nsearch: {{num_iterations: 9}}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nsearch: {c_puct: 2}\n")
    cfg, demo = load_config(tmp_path / "b.yaml"), load_config(DEMO)
    assert (cfg.name, cfg.search.num_iterations, cfg.search.c_puct) == ("mine", 9, 2.0)
    assert cfg.search.num_expansions == demo.search.num_expansions


def test_a_source_of_another_type_replaces_the_old_one(tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"base: {DEMO}\neval: {{benchmarks: {{signs-heldout: {{type: jsonl, path: x.jsonl}}}}}}\n"
    )
    assert load_config(tmp_path / "a.yaml").eval.benchmarks["signs-heldout"].type == "jsonl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: me.yaml\n", "break the circle"),
        ("base: [a, b]\n", "`base` must be the path of one YAML file"),
        ("base: none.yaml\n", "none.yaml: can't be read"),
        ("name: a\nname: b\n", "me.yaml:2: not YAML ('name' is given twice)"),
        ("search: {\n", "not YAML"),
        ("- 1\n", "expected `key: value` lines at the top"),
        ("name: x\n", "problems is missing; add it"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "me.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "b.yaml")


def test_every_setting_explains_itself():
    """A section's docstring exists; the schema is the reference that users read."""
    from astro_hpc.config import schema

    for name, value in vars(schema).items():
        if isinstance(value, type) and issubclass(value, schema.Section):
            assert value.__doc__, name

"""Cluster files: typed, with the cluster's values where a stage gives none; mistakes are one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from astro_hpc.config.base import ConfigError
from astro_hpc.launch.cluster import STAGES, load_cluster

CLUSTERS = Path(__file__).parent.parent / "configs" / "clusters"


def _write(folder: Path, text: str) -> Path:
    (folder / "cluster.yaml").write_text(text)
    return folder / "cluster.yaml"


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_cluster_loads_by_path_and_by_name(path):
    cluster = load_cluster(path)
    assert cluster == load_cluster(Path(path.stem)) == load_cluster(Path(path.name))
    for stage in STAGES:
        resources = cluster.stage(stage)
        assert resources.tasks_per_node >= 1
        assert resources.time


def test_a_stage_takes_from_the_cluster_what_it_does_not_give(tmp_path):
    text = """
partition: gpu
qos: normal
gpus_per_node: 4
time: "10:00:00"
environment: {A: 1, B: true}
stages:
  sft: {nodes: 2, time: "1-00:00:00", environment: {B: "2"}}
  search: {gpus_per_node: 1, partition: small}
"""
    cluster = load_cluster(_write(tmp_path, text))
    sft, search, gather = (cluster.stage(name) for name in ("sft", "search", "gather"))
    assert (sft.partition, sft.qos, sft.gpus_per_node, sft.time) == ("gpu", "normal", 4, "1-00:00:00")
    assert sft.tasks_per_node == 4, "one rank a GPU"
    assert sft.environment == {"A": "1", "B": "2"}
    assert (search.partition, search.gpus_per_node, search.tasks_per_node) == ("small", 1, 1)
    assert (gather.gpus_per_node, gather.exclusive, gather.partition) == (0, False, "gpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "unknown key partitoin; did you mean partition?"),
        ("stages: {serch: {}}", "unknown key stages.serch; did you mean search?"),
        ("stages: {search: {shard: 4}}", "unknown key stages.search.shard; did you mean shards?"),
        ("stages: {sft: {shards: 4}}", "unknown key stages.sft.shards"),
        ("time: 24:00:00", "time: input should be a valid string"),
        ('time: "1 day"', "write a time limit as hours:minutes:seconds"),
        ("environment: {A B: 1}", "environment"),
        ('setup: ["a\\nb"]', "must be one line"),
        ("partition: 'gpu; rm -rf /'", "partition"),
        ("stages: {search: {shards: 0}}", "stages.search.shards"),
        ("{venv: /env, container: {runtime: pyxis, image: x}}", "venv and container are both given"),
        ("venv: env", "must be an absolute path"),
    ],
)
def test_mistakes_are_one_line(text, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_cluster(_write(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_cluster_names_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="one of configs/clusters: h100-example, local, sandbox"):
        load_cluster(Path("h200"))

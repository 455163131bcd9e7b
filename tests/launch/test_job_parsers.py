"""TrainJobs and SkyPilot tasks by the projects' own parsers, for every option of `launch`.

`pip install ".[test,clusters]"` in an environment of its own, then `pytest -m clusters`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.clusters

TRAINING = ["train", "--config", "it's: [a] $HOME.yaml", "--out", "/runs/my run", "--resume", "auto"]
OPTIONS = [
    ["--nodes", str(nodes), "--nproc", str(nproc), *cpu, *fsdp]
    for nodes, nproc, cpu, fsdp in itertools.product((1, 2), (1, 8), ([], ["--cpu"]), ([], ["--fsdp"]))
]


@pytest.fixture
def job(tiltune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("TILTUNE_IMAGE", "registry.example/tiltune:0")

    def text(backend: str, options: list[str]) -> str:
        shown = tiltune("launch", "--backend", backend, *options, "--dry-run", "--", *TRAINING)
        assert shown.status == 0, shown.err
        return shown.out

    return text


def kept(given: Any, parsed: Any) -> bool:
    """Whether all of what was given came through a parser."""
    if isinstance(given, dict):
        return isinstance(parsed, dict) and all(name in parsed and kept(value, parsed[name]) for name, value in given.items())
    if isinstance(given, list):
        return len(given) == len(parsed) and all(map(kept, given, parsed))
    return given == parsed


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_trainer_takes_the_trainjob_and_loses_nothing_of_it(job: Callable[..., str], options: list[str]) -> None:
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob as TrainJob

    given = yaml.safe_load(job("kubernetes", options))
    parsed = TrainJob.from_dict(given)
    assert parsed is not None and kept(given, parsed.to_dict())
    misspelt = yaml.safe_load(job("kubernetes", options))
    misspelt["spec"]["trainer"]["nodes"] = misspelt["spec"]["trainer"].pop("numNodes")
    assert not kept(misspelt, TrainJob.from_dict(misspelt).to_dict()), "the control: a field that it does not know"


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_kubernetes_takes_the_pod_that_the_trainjob_asks_for(job: Callable[..., str], options: list[str]) -> None:
    """What the TrainJob lays over its runtime's pod, in a pod of its own, with the trainer's command, variables and resources."""
    import kubernetes_validate

    spec = yaml.safe_load(job("kubernetes", options))["spec"]
    (node,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    trainer = spec["trainer"]
    pod["containers"][0] |= {
        "image": trainer["image"],
        "command": trainer["command"],
        "env": trainer["env"],
        "resources": trainer["resourcesPerNode"],
    }
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": pod}
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)
    pod["terminationGracePeriodSeconds"] = "120 s"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_skypilot_takes_the_task(
    job: Callable[..., str], options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    monkeypatch.chdir(tmp_path)
    import sky

    file = tmp_path / "task.yaml"
    file.write_text(job("skypilot", options))
    task = sky.Task.from_yaml(str(file))
    assert task.num_nodes == int(options[1])
    assert all(resources.use_spot and resources.job_recovery["recover_on_exit_codes"] == [75, 76] for resources in task.resources)
    assert (len(task.resources) == 1) == ("--cpu" in options)
    file.write_text(job("skypilot", options).replace("use_spot: true", "use_spots: true"))
    with pytest.raises(ValueError, match="use_spots"):
        sky.Task.from_yaml(str(file))

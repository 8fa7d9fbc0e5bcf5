"""The examples for Kubernetes and SkyPilot: their shape, their commands, and that their shell is valid.

They are not run here: docs/clusters.md says what was checked besides.
"""

import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from minisft.cli import VERBS
from minisft.recipe import load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
# What these files use of the two formats; a key that is not here is a mistake.
POD = {
    "type": "object",
    "required": ["restartPolicy", "containers", "volumes"],
    "additionalProperties": False,
    "properties": {
        "restartPolicy": {"const": "Never"},
        "terminationGracePeriodSeconds": {"type": "integer", "minimum": 60},
        "containers": {
            "type": "array",
            "items": {
                "required": ["name", "image", "command", "args", "volumeMounts"],
                "additionalProperties": False,
                "properties": {
                    name: {}
                    for name in ("name", "image", "workingDir", "command", "args", "env", "resources", "volumeMounts")
                },
            },
        },
        "volumes": {"type": "array", "items": {"required": ["name"]}},
    },
}
JOB = {
    "required": ["completionMode", "completions", "parallelism", "backoffLimit", "template"],
    "additionalProperties": False,
    "properties": {
        "completionMode": {"const": "Indexed"},
        "completions": {"type": "integer"},
        "parallelism": {"type": "integer"},
        "backoffLimit": {"const": 0},
        "template": {"required": ["spec"], "additionalProperties": False, "properties": {"spec": POD}},
    },
}
JOB_SET = {
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"required": ["name"]},
        "spec": {
            "additionalProperties": False,
            "properties": {
                "failurePolicy": {
                    "additionalProperties": False,
                    "properties": {"maxRestarts": {"type": "integer", "minimum": 1}},
                },
                "replicatedJobs": {
                    "type": "array",
                    "items": {
                        "required": ["name", "replicas", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"const": 1},
                            "template": {"properties": {"spec": JOB}, "required": ["spec"]},
                        },
                    },
                },
            },
        },
    },
}
TASK = {
    "required": ["name", "resources", "num_nodes", "workdir", "setup", "run"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "resources": {
            "additionalProperties": False,
            "properties": {
                "accelerators": {"type": "string", "pattern": r"^\w+:\d+$"},
                "disk_size": {"type": "integer"},
            },
        },
        "num_nodes": {"const": 1},  # the output folder is on the machine's own disk
        "workdir": {"type": "string"},
        "setup": {"type": "string"},
        "run": {"type": "string"},
    },
}


def read(name):
    return yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))


def job():
    [replicated] = read("kubernetes.yaml")["spec"]["replicatedJobs"]
    return replicated["name"], replicated["template"]["spec"]


def scripts():
    [container] = job()[1]["template"]["spec"]["containers"]
    yield pytest.param(container["args"][0], id="kubernetes")
    for part in ("setup", "run"):
        yield pytest.param(read("skypilot.yaml")[part], id=f"skypilot-{part}")


@pytest.mark.parametrize(("name", "schema"), [("kubernetes.yaml", JOB_SET), ("skypilot.yaml", TASK)])
def test_a_file_has_the_shape_of_its_format(name, schema):
    jsonschema.validate(read(name), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read(name) | {"misspelt": 1}, schema)


@pytest.mark.parametrize("script", scripts())
def test_the_shell_is_valid_and_every_command_of_minisft_is_one(script, tmp_path):
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\noutput: o\ndata: {source: d.jsonl}\n")
    for line in script.replace("\\\n", " ").splitlines():
        line = re.sub(r'"\$(JOB_COMPLETION_INDEX|SKYPILOT_NUM_GPUS_PER_NODE)"', "1", line).replace(
            '"${resume[@]}"', "--resume"
        )
        found = re.search(r"(?:^|exec |/)minisft ((?:train|evaluate|report) .*)", line.strip())
        if found:
            verb, *words = shlex.split(found[1])
            arguments = VERBS[verb].parser(verb).parse(words)
            assert load_recipe(recipe, [word for word in arguments.words if "=" in word])


def test_the_machines_of_kubernetes_agree_on_their_number_and_on_the_rendezvous():
    name, spec = job()
    [container] = spec["template"]["spec"]["containers"]
    [script] = container["args"]
    [nodes, processes] = [int(re.findall(rf"{word}(\d+)", script)[0]) for word in ("--nodes ", "training.processes=")]
    assert spec["completions"] == spec["parallelism"] == nodes
    assert processes == nodes * container["resources"]["limits"]["nvidia.com/gpu"]
    # JobSet names a pod SET-JOB-0-INDEX, and the service that finds it like the set.
    job_set = read("kubernetes.yaml")["metadata"]["name"]
    assert f"--rendezvous {job_set}-{name}-0-0.{job_set}:" in script
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}

"""Check the manifests beside this file, or those named, without a cluster: schemas, agreement, and their script.

Core kinds are held against the schemas of Kubernetes 1.29 to the newest known, TrainJobs against Kubeflow Trainer's
models; a field that neither knows is a fault. The script of both jobs is run with a torchrun that ends in every way.

pip install kubernetes-validate kubeflow-trainer-api pyyaml
python tools/launchers/kubernetes/validate.py [FILE ...]

Exits with 1 on a fault, with 77 where the packages are missing.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import kubernetes_validate
    import yaml
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
except ImportError as error:
    print(f"skipped, {error.name} is missing: pip install kubernetes-validate kubeflow-trainer-api pyyaml")
    sys.exit(77)

VERSIONS = [version for version in kubernetes_validate.utils.all_versions() if int(version.split(".")[1]) >= 29]


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, which YAML's loader takes the last of."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} stands twice {node.start_mark}")
        return super().construct_mapping(node, deep)


def find_faults(document: dict[str, Any]) -> Iterator[str]:
    """Yield what the schema of the document's kind says against it."""
    if document["kind"] == "TrainJob":
        try:
            kept = TrainerV1alpha1TrainJob.from_dict(document).to_dict()
        except ValueError as error:
            yield " ".join(str(error).split()).partition(" For further")[0]
        else:  # the models drop what they do not know
            yield from (f"{path}: unknown field" for path in find_lost(document, kept))
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{'.'.join(map(str, error.path))}: {error.message} (Kubernetes {version})"
            return
        except kubernetes_validate.SchemaNotFoundError as error:
            yield error.message
            return


def find_lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of what is given and not kept."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            below = f"{path}.{key}".lstrip(".")
            if key in kept:
                yield from find_lost(value, kept[key], below)
            else:
                yield below
    elif isinstance(given, list) and isinstance(kept, list):
        for index, (value, other) in enumerate(zip(given, kept, strict=True)):
            yield from find_lost(value, other, f"{path}.{index}")


def find_disagreements(job: dict[str, Any], services: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what a change in one place has left in another: the nodes, the GPUs, the names."""
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    env = {variable["name"]: variable.get("value") for variable in container["env"]}
    nodes = {str(spec["completions"]), str(spec["parallelism"]), env["PET_NNODES"]}
    if len(nodes) > 1:
        yield f"completions, parallelism and PET_NNODES differ: {', '.join(sorted(nodes))}"
    if env["PET_NPROC_PER_NODE"] != str(container["resources"]["limits"]["nvidia.com/gpu"]):
        yield "PET_NPROC_PER_NODE is not the number of GPUs"
    name = job["metadata"]["name"]
    if env["PET_MASTER_ADDR"] != f"{name}-0.{pod['subdomain']}":
        yield f"PET_MASTER_ADDR is not {name}-0.{pod['subdomain']}"
    if not any(
        service["metadata"]["name"] == pod["subdomain"]
        and service["spec"].get("selector") == {"batch.kubernetes.io/job-name": name}
        for service in services
    ):
        yield f"no service {pod['subdomain']} selects the pods of {name}"


# How attempts end (what torchrun returns and what status.json then says, an exit code, "running" or nothing new),
# and how the pod is to end after how many of them; TERM: told to stop meanwhile. An earlier attempt said 2. refused: a
# start that failed in the folder of an earlier run, with 4.
ENDINGS = [
    ([(0, 0)], 0, 1),
    ([(1, 0)], 0, 1),
    *(([(1, code)], code, 1) for code in (2, 3, 4, 5)),
    ([(1, 6)], 6, 4),
    ([(1, 7), (1, 75), (1, 75), (1, 75), (1, "running"), (0, 0)], 0, 6),
    ([(1, "nothing")], 1, 4),
    ([(1, "running")], 1, 4),
    ([(1, "refused")], 4, 1),
    ([("TERM", 75)], 75, 1),
    ([("TERM", "nothing")], 75, 1),
    ([("TERM", 5)], 5, 1),
]
PET = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
STUB = """#!/bin/sh
echo >>attempts; attempt=$(wc -l <attempts)
line=$(sed -n "${attempt}p" endings); [ "$line" ] || line=$(tail -n 1 endings)
said=${line#* } code=${line% *}
if [ "$code" = TERM ]; then
  trap 'asked=yes' TERM; kill -TERM $PPID; code=1
  for _ in $(seq 50); do [ "$asked" ] || /bin/sleep 0.1; done
  [ "$asked" ] || said=99 # not handed on
fi
case $said in
  nothing) ;;
  refused) printf '{\\n  "exit_code": 4,\\n  "time": %s\\n}\\n' "$attempt" >failed_start.json ;;
  running) echo "{ \\"state\\": \\"running\\", \\"time\\": $attempt}" >status.json ;;
  *) printf '{\\n  "state": "ended",\\n  "exit_code": %s,\\n  "time": %s\\n}\\n' "$said" "$attempt" >status.json ;;
esac
exit "$code"
"""


def try_script(command: list[str]) -> Iterator[str]:
    """Run the script of a container and yield where it ends otherwise than it should."""
    for endings, expected, attempts in ENDINGS:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in (("torchrun", STUB), ("resnest-train", "#!/bin/sh\npwd\n"), ("sleep", "#!/bin/sh\n")):
                Path(folder, name).write_text(text)
                Path(folder, name).chmod(0o755)
            Path(folder, "endings").write_text("".join(f"{launched} {said}\n" for launched, said in endings))
            Path(folder, "status.json").write_text(json.dumps({"state": "failed", "exit_code": 2}))
            env = {
                f"PET_{name}": "0" for name in ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
            }
            env["PATH"] = f"{folder}:{os.environ['PATH']}"
            ended = subprocess.run(command, cwd=folder, env=env, check=False).returncode
            tried = len(Path(folder, "attempts").read_text())
            if (ended, tried) != (expected, attempts):
                yield f"after {endings} the script exits with {ended} in attempt {tried}, not {expected} in {attempts}"


def check(paths: list[Path]) -> bool:
    """Print a line for each document and each fault; say whether there was none."""
    try:
        documents = [(path, one) for path in paths for one in yaml.load_all(path.open(), StrictLoader) if one]
    except yaml.YAMLError as error:
        print(" ".join(str(error).split()))
        return False
    services = [one for _, one in documents if one["kind"] == "Service"]
    scripts: set[str] = set()
    is_good = True
    for path, document in documents:
        kind, faults = document["kind"], list(find_faults(document))
        if kind == "Job" and not faults:
            faults += find_disagreements(document, services)
        if kind in ("Job", "TrainJob") and not faults:
            spec = document["spec"]
            command = (spec["trainer"] if kind == "TrainJob" else spec["template"]["spec"]["containers"][0])["command"]
            if command[2] not in scripts:
                faults += try_script(command)
            scripts.add(command[2])
            if len(scripts) > 1:
                faults.append("its script differs from the other manifest's")
        for line in faults or ["ok"]:
            print(f"{path.name}: {kind} {document['metadata']['name']}: {line}")
        is_good &= not faults
    return is_good


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]] or sorted(Path(__file__).parent.glob("*.yaml"))
    sys.exit(0 if check(files) else 1)

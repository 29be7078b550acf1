"""A schedule for other schedulers: a crontab line, a Kubernetes CronJob, a KubeRay RayCronJob.

Each of them only calls ``schedule tick``, which decides what is due. So what they promise less of
(time zones, catching up, overlap, retries) is still kept, and one that fires twice does no harm.
"""

import shlex
from datetime import UTC, datetime
from typing import Any

import yaml
from cronsim import CronSim

from pipeline.errors import RunRefused
from pipeline.schedule import Spec

RAY = "2.60.0"  # of the image; all nodes must agree on it
GRACE_S = 60  # Kubernetes' 30 is too short for Ray to drain a node (RAY.md section 4.3)
TOKEN_KEY = "auth_token"  # noqa: S105 - the key that KubeRay asks of a token's Secret
TOKEN_FOLDER = "/var/run/secrets/maskfleet"  # noqa: S105 - where it is mounted
ACCOUNT = "maskfleet"
IMAGE = f"FILL-IN/maskfleet:ray-{RAY}"

FILL_IN = f"""\
# To fill in: the image (rayproject/ray:{RAY}-py311-cpu with Maskfleet installed) and a service
# account that may read the images and write the runs and the schedules.
"""


def crontab(uri: str, name: str, spec: Spec, program: list[str], address: str | None) -> str:
    """A line for the crontab of a machine in any time zone.

    It ticks every five minutes, or every minute where the schedule needs it: `tick` knows the time
    zone, catches up after the machine was off, and writes down how jobs ended.
    """
    minutes = CronSim(spec.cron, datetime.now(UTC)).minutes
    often = "*/5" if all(minute % 5 == 0 for minute in minutes) else "*"
    words = shlex.join([*program, *_tick(uri, name, address)])
    return f"{often} * * * * {words.replace('%', chr(92) + '%')}\n"  # cron makes % a new line


def cronjob(uri: str, name: str, spec: Spec, image: str, address: str | None) -> str:
    """A Kubernetes CronJob (1.27 or later, for its time zone)."""
    _refuse_local(uri)
    container: dict[str, Any] = {
        "name": "tick",
        "image": image,
        "command": ["maskfleet", *_tick(uri, name, address), "--wait"],
    }
    if address is not None:
        # As a file: what stands in the environment of a process can be read beside it.
        container["env"] = [
            {"name": "RAY_AUTH_MODE", "value": "token"},
            {"name": "RAY_AUTH_TOKEN_PATH", "value": f"{TOKEN_FOLDER}/{TOKEN_KEY}"},
        ]
        container["volumeMounts"] = [
            {"name": "ray-token", "mountPath": TOKEN_FOLDER, "readOnly": True}
        ]
    pod = {
        "serviceAccountName": ACCOUNT,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_S,
        "containers": [container],
    }
    if address is not None:
        secret = {"secretName": f"{ACCOUNT}-ray-token", "defaultMode": 0o400}
        pod["volumes"] = [{"name": "ray-token", "secret": secret}]
    token = (
        f"# And the cluster's token: a Secret {ACCOUNT}-ray-token with the key {TOKEN_KEY}.\n"
        if address is not None
        else ""
    )
    return f"{FILL_IN}{token}" + _yaml(
        {
            "apiVersion": "batch/v1",
            "kind": "CronJob",
            "metadata": {"name": f"maskfleet-{name}"},
            "spec": {
                "schedule": spec.cron,
                "timeZone": spec.zone,
                "suspend": spec.state != "active",
                "concurrencyPolicy": "Forbid",
                "startingDeadlineSeconds": 3600,
                "successfulJobsHistoryLimit": 3,
                "failedJobsHistoryLimit": 3,
                "jobTemplate": {"spec": {"backoffLimit": 3, "template": {"spec": pod}}},
            },
        }
    )


def kuberay(uri: str, name: str, spec: Spec, image: str) -> str:
    """A KubeRay RayCronJob: a cluster for each run, gone after it.

    The job is a child process of the tick, on the head, and uses the cluster around it.
    """
    _refuse_local(uri)
    if spec.address is not None:
        raise RunRefused(
            f"{name} runs on the cluster at {spec.address}; print it as a cronjob, "
            "or add it without --address to have a cluster made for each run"
        )
    head = {
        "rayStartParams": {"num-cpus": "0"},
        "template": _pod("ray-head", image, {"cpu": "2", "memory": "8Gi"}),
    }
    workers = {
        "groupName": "cpu",
        "replicas": 1,
        "minReplicas": 1,
        "maxReplicas": 8,
        "rayStartParams": {},
        "template": _pod("ray-worker", image, {"cpu": "8", "memory": "16Gi"}),
    }
    job = {
        "entrypoint": shlex.join(
            ["python", "-m", "jobs.schedule", *_tick(uri, name)[1:], "--wait"]
        ),
        "submissionMode": "K8sJobMode",
        "backoffLimit": 2,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "rayClusterSpec": {
            "rayVersion": RAY,
            "authOptions": {"mode": "token"},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {"idleTimeoutSeconds": 300},
            "headGroupSpec": head,
            "workerGroupSpecs": [workers],
        },
    }
    needs = (
        "# Needs KubeRay 1.7 or later (1.6 knows no timeZone) with the feature gate RayCronJob.\n"
    )
    return f"{FILL_IN}{needs}" + _yaml(
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayCronJob",
            "metadata": {"name": f"maskfleet-{name}"},
            "spec": {
                "schedule": spec.cron,
                "timeZone": spec.zone,
                "suspend": spec.state != "active",
                "jobTemplate": job,
            },
        }
    )


def _tick(uri: str, name: str, address: str | None = None) -> list[str]:
    at = [] if address is None else ["--address", address]
    return ["schedule", "tick", uri, name, *at]


def _pod(name: str, image: str, size: dict[str, str]) -> dict[str, Any]:
    resources = {"requests": size, "limits": size}
    return {
        "spec": {
            "serviceAccountName": ACCOUNT,
            "terminationGracePeriodSeconds": GRACE_S,
            "containers": [{"name": name, "image": image, "resources": resources}],
        }
    }


def _refuse_local(uri: str) -> None:
    if not uri.startswith("s3://"):
        raise RunRefused(
            f"{uri} is a folder of this machine, which no pod sees; "
            "keep the schedules below s3://bucket/prefix"
        )


def _yaml(manifest: dict[str, Any]) -> str:
    return yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=100)

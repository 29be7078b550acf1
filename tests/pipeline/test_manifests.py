"""What other schedulers are told: only fields they know, and words that a shell leaves alone."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import yaml

from pipeline import manifests
from pipeline.errors import RunRefused
from tests.schedules import spec

URI, NAME = "s3://bucket/schedules", "nightly"
BERLIN = spec("30 3 * * 1-5", zone="Europe/Berlin")

# The fields of KubeRay's CRDs (ray.io/v1 of KubeRay 1.7) and of Kubernetes' that we may use; an API
# server drops or refuses any other.
POD = {"spec": {"serviceAccountName", "restartPolicy", "terminationGracePeriodSeconds",
                "containers", "volumes"}}  # fmt: skip
RAY_JOB = {"entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes",
           "ttlSecondsAfterFinished", "rayClusterSpec", "runtimeEnvYAML", "clusterSelector",
           "activeDeadlineSeconds", "metadata", "submitterPodTemplate", "suspend"}  # fmt: skip
RAY_CLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions",
               "headGroupSpec", "workerGroupSpecs"}  # fmt: skip
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
CRON_JOB = {"schedule", "timeZone", "suspend", "concurrencyPolicy", "startingDeadlineSeconds",
            "successfulJobsHistoryLimit", "failedJobsHistoryLimit", "jobTemplate"}  # fmt: skip


def pod_is_known(template: dict[str, Any]) -> dict[str, Any]:
    """Check a pod template; returns its one container."""
    assert set(template) == {"spec"}
    assert set(template["spec"]) <= POD["spec"]
    assert template["spec"]["terminationGracePeriodSeconds"] >= 60
    (container,) = template["spec"]["containers"]
    assert set(container) <= {"name", "image", "command", "env", "resources", "volumeMounts"}
    return container


def test_a_raycronjob_has_only_fields_that_kuberay_knows():
    manifest = yaml.safe_load(manifests.kuberay(URI, NAME, BERLIN, "registry/maskfleet:1"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCronJob")
    cron = manifest["spec"]
    assert set(cron) == {"schedule", "timeZone", "suspend", "jobTemplate"}
    assert (cron["schedule"], cron["timeZone"]) == ("30 3 * * 1-5", "Europe/Berlin")
    job = cron["jobTemplate"]
    assert set(job) <= RAY_JOB
    assert job["submissionMode"] in {"K8sJobMode", "HTTPMode", "SidecarMode"}
    words = shlex.split(job["entrypoint"])
    assert words == ["python", "-m", "jobs.schedule", "tick", URI, NAME, "--wait"]
    cluster = job["rayClusterSpec"]
    assert set(cluster) <= RAY_CLUSTER
    assert cluster["authOptions"] == {"mode": "token"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    (workers,) = cluster["workerGroupSpecs"]
    assert set(workers) == WORKERS
    for template in (cluster["headGroupSpec"]["template"], workers["template"]):
        container = pod_is_known(template)
        assert container["image"] == "registry/maskfleet:1"
        assert set(container["resources"]) == {"requests", "limits"}


@pytest.mark.parametrize("address", [None, "http://head:8265"])
def test_a_cronjob_ticks_and_has_the_token_from_a_secret(address):
    text = manifests.cronjob(URI, NAME, BERLIN, "registry/maskfleet:1", address)
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "CronJob")
    cron = manifest["spec"]
    assert set(cron) == CRON_JOB
    assert cron["concurrencyPolicy"] == "Forbid"
    job = cron["jobTemplate"]["spec"]
    assert set(job) == {"backoffLimit", "template"}
    container = pod_is_known(job["template"])
    where = [] if address is None else ["--address", address]
    tick = ["maskfleet", "schedule", "tick", URI, NAME, *where, "--wait"]
    assert container["command"] == tick
    environment = {entry["name"]: entry["value"] for entry in container.get("env", ())}
    volumes = job["template"]["spec"].get("volumes", [])
    if address is None:
        assert (environment, volumes) == ({}, [])
        return
    (mount,), (volume,) = container["volumeMounts"], volumes
    assert environment["RAY_AUTH_TOKEN_PATH"] == f"{mount['mountPath']}/auth_token"
    assert mount["name"] == volume["name"]
    assert volume["secret"] == {"secretName": "maskfleet-ray-token", "defaultMode": 0o400}


def test_names_are_fit_for_kubernetes_even_at_their_longest():
    longest = manifests.cronjob(URI, "a" * 40, BERLIN, "i", None)
    name = yaml.safe_load(longest)["metadata"]["name"]
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 52  # a CronJob adds 11 of 63


def test_a_paused_schedule_is_suspended():
    paused = spec(state="paused")
    for text in (
        manifests.kuberay(URI, NAME, paused, "i"),
        manifests.cronjob(URI, NAME, paused, "i", None),
    ):
        assert yaml.safe_load(text)["spec"]["suspend"] is True


@pytest.mark.parametrize(
    ("cron", "often"), [("30 3 * * *", "*/5"), ("*/10 * * * *", "*/5"), ("7 3 * * *", "*")]
)
def test_a_crontab_line_ticks_as_often_as_the_schedule_needs(cron, often):
    line = manifests.crontab("/srv/with space/100%", NAME, spec(cron), ["/bin/maskfleet"], None)
    assert line.startswith(f"{often} * * * * /bin/maskfleet schedule tick ")
    assert line.count("\n") == 1
    command = line.split(maxsplit=5)[5]
    assert re.search(r"(?<!\\)%", command) is None  # cron ends the command at one
    words = shlex.split(command.replace("\\%", "%"))
    assert words == ["/bin/maskfleet", "schedule", "tick", "/srv/with space/100%", NAME]


def test_pods_cannot_see_a_folder_of_this_machine():
    with pytest.raises(RunRefused, match="no pod sees"):
        manifests.kuberay("/srv/schedules", NAME, BERLIN, "i")
    with pytest.raises(RunRefused, match="no pod sees"):
        manifests.cronjob("/srv/schedules", NAME, BERLIN, "i", None)


def test_a_schedule_for_a_standing_cluster_is_not_given_a_cluster_of_its_own():
    with pytest.raises(RunRefused, match="print it as a cronjob"):
        manifests.kuberay(URI, NAME, spec(address="http://head:8265"), "i")

"""The manifests: rendered, held against the schemas of three Kubernetes versions and against what
must always hold, with planted faults; their commands run."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import tiny
import yaml
from bundles import make_place, settings_of
from manifest_checks import CHECKS, Check, name_of
from manifests import ROOT, SETS, Doc, named, rendered, tool
from servers import free_port

import ecdctr
from service.app import create_app
from training.cpm import cpm_name
from training.workspace import Workspace

VERSIONS = ("1.35", "1.36", "1.37")
"""Of Kubernetes; the three that are supported upstream."""
CUSTOM = ("ServiceMonitor", "PrometheusRule")
"""Kinds that are no part of Kubernetes; `monitoring` checks their shape."""
UPDATE = "jobTemplate.spec.template.spec.containers.0"
POD = "template.spec.containers.0"
BY_NAME = {check.__name__: check for check in CHECKS}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SETS)
def test_the_manifests_have_no_fault(name: str, check: Check) -> None:
    assert list(check(rendered(name))) == []


GONE = object()
SERVICE, NODES = "Deployment/ecdctr", "Job/training-nodes"
FAULTS: list[tuple[str, str, str, str, object, str]] = [
    ("images", "dev", SERVICE, f"spec.{POD}.image", "x/ecdctr-service:latest", "no fixed version"),
    ("images", "dev", "StatefulSet/ecdctr-store", f"spec.{POD}.image", "h:5000/valkey", "no fixed"),
    (
        "resources",
        "prod",
        SERVICE,
        f"spec.{POD}.resources.limits.memory",
        "2Gi",
        "is not the request",
    ),
    (
        "resources",
        "base",
        "CronJob/store-gc",
        f"spec.{UPDATE}.resources.limits.cpu",
        GONE,
        "no cpu",
    ),
    ("resources", "base", "CronJob/update-cpm", f"spec.{UPDATE}.resources", GONE, "no memory"),
    ("threads", "base", SERVICE, f"spec.{POD}.args.6", "4", "4 workers on 2 cores"),
    ("threads", "base", SERVICE, f"spec.{POD}.env.1.value", "16", "OMP_NUM_THREADS is more than 2"),
    ("threads", "base", SERVICE, f"spec.{POD}.env.1", GONE, "a thread per core of the node"),
    ("autoscaling", "prod", SERVICE, "spec.replicas", 3, "replicas beside an autoscaler"),
    ("autoscaling", "prod", SERVICE, "metadata.name", "other", "which is not there"),
    (
        "autoscaling",
        "prod",
        "PrometheusRule/ecdctr",
        "spec.groups.0.rules.0",
        GONE,
        "nothing makes",
    ),
    (
        "autoscaling",
        "base",
        "HorizontalPodAutoscaler/ecdctr",
        "spec.maxReplicas",
        2,
        "ecdctr: can't scale",
    ),
    (
        "autoscaling",
        "base",
        "HorizontalPodAutoscaler/ecdctr",
        "spec.metrics.0.resource.name",
        "memory",
        "does not look at cpu",
    ),
    ("selectors", "base", SERVICE, "spec.selector.matchLabels", {"a": "b"}, "its own pods"),
    (
        "selectors",
        "base",
        "Service/ecdctr",
        "spec.selector",
        {"a": "b"},
        "Service/ecdctr: selects no",
    ),
    (
        "selectors",
        "training-nodes",
        "Service/training-nodes",
        "spec.clusterIP",
        GONE,
        "no headless",
    ),
    (
        "disruption",
        "base",
        "PodDisruptionBudget/ecdctr",
        "spec.selector.matchLabels",
        {"app.kubernetes.io/component": "store"},
        "no PodDisruptionBudget selects it",
    ),
    ("disruption", "base", "PodDisruptionBudget/ecdctr", "spec.maxUnavailable", 0, "no disruption"),
    ("network", "dev", "NetworkPolicy/default-deny", "spec.policyTypes.1", GONE, "denies all"),
    ("network", "dev", "NetworkPolicy/default-deny", "spec.ingress", [{}], "denies all by default"),
    ("network", "dev", "NetworkPolicy/dns", "spec.podSelector", {"a": "b"}, "resolve names"),
    (
        "network",
        "dev",
        "NetworkPolicy/training",
        "spec.podSelector",
        {"a": "b"},
        "applies to no pod",
    ),
    (
        "network",
        "dev",
        "NetworkPolicy/store",
        "spec.podSelector",
        {"a": "b"},
        "no policy of its own",
    ),
    ("network", "dev", "NetworkPolicy/service", "spec.ingress.0.from", [], "lets everybody in"),
    (
        "references",
        "dev",
        SERVICE,
        f"spec.{POD}.env.0.valueFrom.secretKeyRef.key",
        "u",
        "secret ecdc",
    ),
    (
        "references",
        "dev",
        SERVICE,
        f"spec.{POD}.envFrom.0.configMapRef.name",
        "x",
        "no ConfigMap x",
    ),
    (
        "references",
        "dev",
        SERVICE,
        "spec.template.spec.volumes.0.name",
        "x",
        "mounts workspace, wh",
    ),
    (
        "references",
        "dev",
        SERVICE,
        "spec.template.spec.serviceAccountName",
        "x",
        "no ServiceAccount",
    ),
    (
        "references",
        "dev",
        "StatefulSet/ecdctr-store",
        f"spec.{POD}.volumeMounts.0.subPath",
        "redis.conf",
        "has no redis.conf",
    ),
    (
        "probes",
        "base",
        SERVICE,
        f"spec.{POD}.livenessProbe.httpGet.path",
        "/readyz",
        "must ask /live",
    ),
    ("probes", "base", SERVICE, f"spec.{POD}.startupProbe.httpGet.path", "/readyz", "startup must"),
    ("probes", "base", SERVICE, f"spec.{POD}.readinessProbe.httpGet.path", "/livez", "ask /readyz"),
    ("probes", "base", SERVICE, f"spec.{POD}.startupProbe.failureThreshold", 3, "has 6 s to start"),
    ("probes", "base", SERVICE, f"spec.{POD}.readinessProbe", GONE, "lacks a probe"),
    ("probes", "base", SERVICE, f"spec.{POD}.livenessProbe.periodSeconds", 1, "before it is taken"),
    ("tokens", "base", "ServiceAccount/ecdctr", "automountServiceAccountToken", True, "its token"),
    ("tokens", "base", SERVICE, "spec.template.spec.automountServiceAccountToken", GONE, "a token"),
    (
        "hardening",
        "base",
        SERVICE,
        "spec.template.spec.securityContext.runAsNonRoot",
        GONE,
        "as root",
    ),
    (
        "hardening",
        "base",
        SERVICE,
        "spec.template.spec.securityContext.runAsUser",
        1,
        "as its image",
    ),
    (
        "hardening",
        "dev",
        SERVICE,
        "spec.template.spec.securityContext.seccompProfile",
        GONE,
        "secco",
    ),
    ("hardening", "dev", SERVICE, "spec.template.spec.hostNetwork", True, "node's namespaces"),
    (
        "hardening",
        "dev",
        SERVICE,
        "spec.template.spec.volumes.1.hostPath",
        {"path": "/"},
        "its node",
    ),
    ("hardening", "dev", SERVICE, "spec.template.spec.volumes.1.emptyDir", {}, "tmp may fill"),
    (
        "hardening",
        "dev",
        SERVICE,
        f"spec.{POD}.securityContext.capabilities.add",
        ["X"],
        "keeps cap",
    ),
    (
        "hardening",
        "training-nodes",
        NODES,
        f"spec.{POD}.securityContext.readOnlyRootFilesystem",
        False,
        "may write its root",
    ),
    (
        "hardening",
        "dev",
        "CronJob/update-actr",
        f"spec.{UPDATE}.securityContext.allowPrivilegeEscalation",
        GONE,
        "may become root",
    ),
    ("hardening", "dev", SERVICE, f"spec.{POD}.volumeMounts.1", GONE, "has no /tmp"),
    ("cronjobs", "base", "CronJob/update-tpm", "spec.concurrencyPolicy", "Allow", "twice at once"),
    ("cronjobs", "base", "CronJob/update-tpm", "spec.timeZone", GONE, "in which time zone"),
    ("cronjobs", "base", "CronJob/update-tpm", "spec.startingDeadlineSeconds", GONE, "no starting"),
    ("cronjobs", "base", "CronJob/update-tpm", "spec.schedule", "0 17 1 * *", "after midnight"),
    (
        "cronjobs",
        "base",
        "CronJob/store-gc",
        "spec.jobTemplate.spec.activeDeadlineSeconds",
        GONE,
        "no activeDeadlineSeconds",
    ),
    (
        "cronjobs",
        "base",
        "CronJob/store-gc",
        "spec.jobTemplate.spec.template.spec.restartPolicy",
        "OnFailure",
        "restarts in place",
    ),
    (
        "cronjobs",
        "base",
        "CronJob/rollback",
        "spec.jobTemplate.spec.backoffLimit",
        1,
        "rolls back tw",
    ),
    ("cronjobs", "base", "CronJob/rollback", "spec.suspend", GONE, "rolls back twice"),
    ("nodes", "training-nodes", NODES, "spec.parallelism", 1, "not as many pods at once as nodes"),
    ("nodes", "training-nodes", NODES, "spec.completionMode", "NonIndexed", "which one it is"),
    (
        "nodes",
        "training-nodes",
        NODES,
        "spec.template.spec.subdomain",
        "n",
        "is not the first node",
    ),
    (
        "nodes",
        "training-nodes",
        NODES,
        f"spec.{POD}.args.1",
        "--nproc-per-node=8",
        "more processes",
    ),
    ("nodes", "training-nodes", NODES, f"spec.{POD}.args.4", "--master-port=1", "no pod opens 1"),
    ("nodes", "training-nodes", NODES, "spec.backoffLimit", GONE, "has no end"),
    (
        "environment",
        "dev",
        "ConfigMap/ecdctr",
        "data.ECDCTR_POLL",
        "1",
        "nothing reads ECDCTR_POLL",
    ),
    ("environment", "dev", "ConfigMap/ecdctr", "data.ECDCTR_LOG_LEVEL", "loud", "must be one of"),
    (
        "environment",
        "dev",
        "ConfigMap/ecdctr",
        "data.ECDCTR_REGISTRY",
        "/r",
        "which is not mounted",
    ),
    (
        "environment",
        "object-store",
        "ConfigMap/ecdctr",
        "data.ECDCTR_REGISTRY_CACHE",
        "/elsewhere",
        "is in '/elsewhere', which is not mounted",
    ),
    (
        "environment",
        "object-store",
        "CronJob/rollback",
        f"spec.{UPDATE}.envFrom",
        GONE,
        "has another registry than the service",
    ),
    (
        "workspace",
        "object-store",
        "ConfigMap/ecdctr",
        "data.ECDCTR_REGISTRY",
        "/workspace/registry",
        "has no workspace",
    ),
    ("environment", "dev", "ConfigMap/ecdctr", "data.ECDCTR_DEVICE", "cpu", "no setting is called"),
    ("commands", "base", "CronJob/store-gc", f"spec.{UPDATE}.args.1", "collect", "does not take"),
    ("commands", "training-nodes", NODES, f"spec.{POD}.args.7", "bpm", "does not take"),
    (
        "commands",
        "base",
        "CronJob/update-tpm",
        f"spec.{UPDATE}.image",
        "ecdctr-service",
        "wrong image",
    ),
    ("ports", "base", SERVICE, f"spec.{POD}.args.4", "8001", "listens on 0.0.0.0:8001"),
    ("ports", "base", SERVICE, f"spec.{POD}.args.2", "127.0.0.1", "listens on 127.0.0.1"),
    ("ports", "base", SERVICE, f"spec.{POD}.livenessProbe.httpGet.port", "web", "asks port web"),
    ("ports", "base", "Service/ecdctr", "spec.ports.0.targetPort", "web", "no pod opens web"),
    (
        "ports",
        "base",
        "NetworkPolicy/service",
        "spec.ingress.0.ports.0.port",
        "web",
        "no pod opens",
    ),
    (
        "shutdown",
        "base",
        SERVICE,
        "spec.template.spec.terminationGracePeriodSeconds",
        40,
        "is killed",
    ),
    ("shutdown", "base", SERVICE, f"spec.{POD}.lifecycle", GONE, "before it is out of the Service"),
    (
        "workspace",
        "base",
        SERVICE,
        f"spec.{POD}.volumeMounts.0.readOnly",
        GONE,
        "must be read-only",
    ),
    (
        "workspace",
        "base",
        SERVICE,
        f"spec.{POD}.volumeMounts.0.mountPath",
        "/w",
        "has no workspace",
    ),
    (
        "workspace",
        "base",
        "PersistentVolumeClaim/workspace",
        "spec.accessModes",
        ["ReadWriteOnce"],
        "several nodes",
    ),
    ("store", "dev", "ConfigMap/ecdctr-store", "data", {"valkey.conf": "maxmemory 1gb"}, "evict"),
    ("store", "dev", "ConfigMap/ecdctr-store", "data", {"valkey.conf": "maxmemory 1gb"}, "forgets"),
    ("store", "dev", "ConfigMap/ecdctr-store", "data", {"valkey.conf": "save x"}, "too little"),
    ("store", "dev", "StatefulSet/ecdctr-store", "spec.volumeClaimTemplates", GONE, "no disk"),
    (
        "monitoring",
        "prod",
        "PrometheusRule/ecdctr",
        "spec.groups.1.rules.1.expr",
        "rate(ecdctr_errors_total[5m]) > 0",
        "no metric ecdctr_errors_total",
    ),
    (
        "monitoring",
        "prod",
        "PrometheusRule/ecdctr",
        "spec.groups.1.rules.1.annotations.runbook_url",
        "docs/runbook.md#ecdctrslow",
        "EcdctrErrors: its runbook_url",
    ),
    (
        "monitoring",
        "prod",
        "PrometheusRule/ecdctr",
        "spec.groups.1.rules.1.annotations.summary",
        "",
        "EcdctrErrors: says nothing",
    ),
    (
        "monitoring",
        "prod",
        "PrometheusRule/ecdctr",
        "spec.groups.1.rules.1.labels.severity",
        "high",
        "page or ticket",
    ),
    ("monitoring", "prod", "ServiceMonitor/ecdctr", "spec.endpoints.0.port", "web", "scrapes web"),
    ("namespaces", "dev", SERVICE, "metadata.namespace", "default", "is not in ecdctr-dev"),
    ("namespaces", "dev", "Namespace/ecdctr-dev", "metadata.labels", {}, "takes any pod"),
]
"""Check, set of manifests, document, path in it, value, and what the check should say of it."""


def spoilt(name: str, doc: str, path: str, value: object) -> list[Doc]:
    """The manifests with one value changed, or gone."""
    docs = rendered(name)
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    found: Any = named(docs, doc)
    for part in parents:
        found = found[part]
    if value is GONE:
        del found[last]
    else:
        found[last] = value
    return docs


@pytest.mark.parametrize(("check", "name", "doc", "path", "value", "complaint"), FAULTS)
def test_a_planted_fault_is_found(
    check: str, name: str, doc: str, path: str, value: object, complaint: str
) -> None:
    found = list(BY_NAME[check](spoilt(name, doc, path, value)))
    assert any(complaint in fault for fault in found), found


def test_every_check_has_a_planted_fault() -> None:
    assert {check for check, *_ in FAULTS} == set(BY_NAME)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", SETS)
def test_every_document_fits_the_schema(name: str, version: str) -> None:
    for doc in rendered(name):
        if doc["kind"] not in CUSTOM:
            kubernetes_validate.validate(doc, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schema_finds_a_field_that_does_not_exist(version: str) -> None:
    docs = spoilt("base", SERVICE, f"spec.{POD}.livenessProbe.timeoutMs", 5)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(named(docs, SERVICE), version, strict=True)


def test_every_path_that_is_probed_or_scraped_is_one_of_the_service(tmp_path: Path) -> None:
    routes = {getattr(r, "path", "") for r in create_app(settings_of(make_place(tmp_path))).routes}
    asked = re.findall(r"'path': '(/[^']*)'", str(rendered("prod")))
    assert set(asked) == {"/livez", "/readyz", "/metrics"}
    assert set(asked) <= routes


def test_a_changed_setting_gives_the_pods_another_config_map() -> None:
    names = {name_of(named(rendered(name), "ConfigMap/ecdctr")) for name in ("base", "dev")}
    assert len(names) == 2
    for name in ("base", "dev"):
        docs = rendered(name)
        container = named(docs, SERVICE)["spec"]["template"]["spec"]["containers"][0]
        wanted = name_of(named(docs, "ConfigMap/ecdctr"))
        assert container["envFrom"][0]["configMapRef"]["name"] == wanted


@pytest.mark.parametrize(("name", "day"), [("base", "today"), ("dev", "2017-11-02")])
def test_an_update_is_for_today_unless_its_arguments_say_otherwise(name: str, day: str) -> None:
    job = named(rendered(name), "CronJob/update-tpm")["spec"]["jobTemplate"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    before = today()
    said = str(ecdctr.parser().parse_args(container["args"]).asof)
    assert said in ({before, today()} if day == "today" else {day})


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def test_an_update_without_a_log_fails_with_one_line_and_not_with_a_usage(tmp_path: Path) -> None:
    job = named(rendered("base"), "CronJob/update-tpm")["spec"]["jobTemplate"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    command = [sys.executable, "-m", "ecdctr", *container["args"]]
    environ = {**os.environ, "ECDCTR_WORKSPACE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("ecdctr: ")
    assert str(tmp_path) in done.stderr


def test_the_nodes_of_the_example_find_each_other_and_train_one_model(
    tiny_workspace: Workspace, tmp_path: Path
) -> None:
    workspace = tiny.copy_workspace(tiny_workspace, tmp_path / "workspace")
    asof, port = tiny.ASOF + datetime.timedelta(days=1), free_port()
    job = named(rendered("training-nodes"), NODES)["spec"]
    container = job["template"]["spec"]["containers"][0]
    environ = {**os.environ, "ECDCTR_WORKSPACE": str(workspace.root), "PYTHONPATH": str(ROOT)}
    here = {
        "--nproc-per-node=2": "--nproc-per-node=1",
        "--master-addr=training-nodes-0.training-nodes": "--master-addr=127.0.0.1",
        "--master-port=29500": f"--master-port={port}",
        "2017-11-01": str(asof),
    }
    arguments = [here.get(argument, argument) for argument in container["args"]]
    assert not set(here) & set(arguments)
    nodes = []
    for index in range(job["completions"]):
        own = [argument.replace("$(JOB_COMPLETION_INDEX)", str(index)) for argument in arguments]
        command = [sys.executable, "-m", "torch.distributed.run", *own]
        nodes.append(subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL))
    try:
        assert [node.wait(timeout=240) for node in nodes] == [0] * job["completions"]
    finally:
        for node in nodes:
            node.kill()
    assert workspace.facts(cpm_name(asof), "")["to"] == str(tiny.ASOF)


def test_the_rules_fire_when_they_should_and_not_when_they_should_not(tmp_path: Path) -> None:
    promtool = tool("promtool", "apt-get install prometheus")
    folder = ROOT / "k8s" / "components" / "monitoring"
    rules = yaml.safe_load((folder / "rules.yaml").read_text())["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    cases = yaml.safe_load((folder / "rules.test.yaml").read_text())
    alerts = {
        rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule
    }
    tried = [t for case in cases["tests"] for t in case.get("alert_rule_test", [])]
    for wanted in (True, False):
        found = {t["alertname"] for t in tried if bool(t.get("exp_alerts")) == wanted}
        assert found == alerts, f"a case in which it {'fires' if wanted else 'is silent'}, for each"
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(cases))
    done = subprocess.run(
        [promtool, "test", "rules", "cases.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", ["check-k8s", "check-container"])
def test_the_makefile_runs_these_checks(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert f"tests/test_{target.removeprefix('check-')}.py" in done.stdout

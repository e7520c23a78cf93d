"""What must always hold of the manifests: each check is a function from documents to complaints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from typing import Any

from handbook import documented_secrets
from manifests import ROOT, Doc, Pod, cpus, named, num_bytes, of_kind, pods, selects
from prometheus_client import CollectorRegistry
from test_container import TEXT, Dockerfile

import ecdctr
from service.app import GRACE_S
from service.metrics import Metrics
from service.settings import Settings, SettingsError

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS")
OF_S3 = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")
START_BUDGET_S = 60
CLOSE_S = 5
"""What the service needs at least to close after the last request."""

Check = Callable[[list[Doc]], Iterator[str]]


def images(docs: list[Doc]) -> Iterator[str]:
    """Every image is of a fixed version."""
    for pod in pods(docs):
        for container in pod.containers:
            image = container["image"]
            tag = image.rpartition("/")[2].partition(":")[2]
            is_ours_unnamed = image in ("ecdctr-service", "ecdctr-training")
            if not is_ours_unnamed and "@sha256:" not in image and tag in ("", "latest"):
                yield f"{pod.name}: {image} is of no fixed version"


def resources(docs: list[Doc]) -> Iterator[str]:
    """Every container asks for what it needs and is limited; memory is never overcommitted."""
    for pod in pods(docs):
        for container in pod.containers:
            given = container.get("resources", {})
            for side in ("requests", "limits"):
                for what in ("cpu", "memory"):
                    if what not in given.get(side, {}):
                        yield f"{pod.name}: no {what} in {side}"
            memory = [given.get(side, {}).get("memory") for side in ("requests", "limits")]
            if memory[0] != memory[1]:
                yield f"{pod.name}: memory limit {memory[1]} is not the request {memory[0]}"


def threads(docs: list[Doc]) -> Iterator[str]:
    """As many workers as cores were asked for, and no library with more threads than that."""
    for pod in pods(docs):
        for container in pod.containers:
            cores = cpus(container["resources"]["requests"]["cpu"])
            if pod.owner["kind"] == "Deployment":
                workers = parsed(pod, container).workers
                if workers != cores:
                    yield f"{pod.name}: {workers} workers on {cores:g} cores"
            for variable in container.get("env", []):
                if variable["name"] in THREADS and int(variable["value"]) > max(1, cores):
                    yield f"{pod.name}: {variable['name']} is more than {cores:g} cores"
            if is_ours(container) and not {*THREADS[:2]} <= set(env_names(docs, container)):
                yield f"{pod.name}: a thread per core of the node, not of the pod"


def autoscaling(docs: list[Doc]) -> Iterator[str]:
    """The autoscaler alone says how many there are, by processor time in any case."""
    for scaler in of_kind(docs, "HorizontalPodAutoscaler"):
        spec, target = scaler["spec"], scaler["spec"]["scaleTargetRef"]
        found = [d for d in of_kind(docs, target["kind"]) if name_of(d) == target["name"]]
        if not found:
            yield f"{name_of(scaler)}: scales {target['name']}, which is not there"
        if any("replicas" in doc["spec"] for doc in found):
            yield f"{target['name']}: replicas beside an autoscaler undo what it does"
        if not 1 <= spec["minReplicas"] < spec["maxReplicas"]:
            yield f"{name_of(scaler)}: can't scale"
        if not any(m.get("resource", {}).get("name") == "cpu" for m in spec["metrics"]):
            yield f"{name_of(scaler)}: does not look at cpu"
        yield from _unrecorded(docs, spec["metrics"])


def _unrecorded(docs: list[Doc], metrics: list[Doc]) -> Iterator[str]:
    asked = {m["pods"]["metric"]["name"] for m in metrics if m["type"] == "Pods"}
    recorded = {rule.get("record") for rule in _rules(docs)}
    for metric in sorted(asked - recorded - metric_names()):
        yield f"nothing makes the metric {metric} that the autoscaler asks for"


def selectors(docs: list[Doc]) -> Iterator[str]:
    """What selects pods selects some, and a controller its own."""
    everything = list(pods(docs))
    for pod in everything:
        if pod.is_server and not selects(pod.owner["spec"]["selector"], pod.labels):
            yield f"{pod.name}: does not select its own pods"
    for doc in of_kind(docs, "Service", "PodDisruptionBudget"):
        if not any(selects(doc["spec"]["selector"], pod.labels) for pod in everything):
            yield f"{doc['kind']}/{name_of(doc)}: selects no pod"
    for pod in everything:
        own = [d for d in of_kind(docs, "Service") if name_of(d) == pod.spec.get("subdomain")]
        if "subdomain" in pod.spec and not (
            own
            and own[0]["spec"].get("clusterIP") == "None"
            and selects(own[0]["spec"]["selector"], pod.labels)
        ):
            yield f"{pod.name}: no headless Service gives its pods names"


def disruption(docs: list[Doc]) -> Iterator[str]:
    """Every Deployment has a budget, which lets a node be drained."""
    budgets = of_kind(docs, "PodDisruptionBudget")
    for pod in (pod for pod in pods(docs) if pod.owner["kind"] == "Deployment"):
        if not any(selects(b["spec"]["selector"], pod.labels) for b in budgets):
            yield f"{pod.name}: no PodDisruptionBudget selects it"
    for budget in budgets:
        if budget["spec"].get("maxUnavailable") in (None, 0, "0%"):
            yield f"{name_of(budget)}: allows no disruption"


def network(docs: list[Doc]) -> Iterator[str]:
    """Nothing is open but what a policy of the workload opens; names can be resolved."""
    policies = [policy["spec"] for policy in of_kind(docs, "NetworkPolicy")]
    for_all = [policy for policy in policies if not policy["podSelector"]]
    if not any(
        set(p["policyTypes"]) == {"Ingress", "Egress"} and not {"ingress", "egress"} & p.keys()
        for p in for_all
    ):
        yield "there is no policy that denies all by default"
    if 53 not in [
        port["port"] for p in for_all for to in p.get("egress", []) for port in to["ports"]
    ]:
        yield "no policy lets pods resolve names"
    for pod in pods(docs):
        if not any(p["podSelector"] and selects(p["podSelector"], pod.labels) for p in policies):
            yield f"{pod.name}: has no policy of its own"
    for policy in of_kind(docs, "NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        if not any(selects(selector, pod.labels) for pod in pods(docs)):
            yield f"{name_of(policy)}: applies to no pod"
        for rule in policy["spec"].get("ingress", []):
            if not rule.get("from"):
                yield f"{name_of(policy)}: lets everybody in"


def references(docs: list[Doc]) -> Iterator[str]:
    """Every name that a pod refers to is there, or the operator is told to make it."""
    names = {(doc["kind"], name_of(doc)) for doc in docs}
    for pod in pods(docs):
        for kind, name, key in referred(pod):
            if kind == "Secret":
                if key not in documented_secrets().get(name, ()):
                    yield f"{pod.name}: secret {name} with {key} is not in docs/operations.md"
            elif (kind, name) not in names:
                yield f"{pod.name}: there is no {kind} {name}"
            elif kind == "ConfigMap" and key and key not in config_map(docs, name)["data"]:
                yield f"{pod.name}: {name} has no {key}"
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        volumes |= {name_of(c) for c in pod.owner["spec"].get("volumeClaimTemplates", [])}
        for container in pod.containers:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{pod.name}: mounts {mount['name']}, which is no volume"


def referred(pod: Pod) -> Iterator[tuple[str, str, str]]:
    """Kind, name and key (empty where all keys count) of what a pod needs."""
    yield "ServiceAccount", pod.spec.get("serviceAccountName", "default"), ""
    for volume in pod.spec.get("volumes", []):
        if claim := volume.get("persistentVolumeClaim"):
            yield "PersistentVolumeClaim", claim["claimName"], ""
        if secret := volume.get("secret"):
            for item in secret["items"]:
                yield "Secret", secret["secretName"], item["key"]
        if config := volume.get("configMap"):
            keys = {
                m["subPath"]
                for c in pod.containers
                for m in c["volumeMounts"]
                if m["name"] == volume["name"]
            }
            yield from (("ConfigMap", config["name"], key) for key in keys)
    for container in pod.containers:
        for source in container.get("envFrom", []):
            yield "ConfigMap", source["configMapRef"]["name"], ""
        for variable in container.get("env", []):
            if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
                yield "Secret", secret["name"], secret["key"]


def probes(docs: list[Doc]) -> Iterator[str]:
    """Three probes with three meanings; a restart is never the answer to a store that is away."""
    for pod in pods(docs):
        for container in pod.containers if pod.is_server else []:
            kinds = ("startupProbe", "livenessProbe", "readinessProbe")
            if not all(kind in container for kind in kinds):
                yield f"{pod.name}: lacks a probe"
                continue
            start, live, ready = (container[kind] for kind in kinds)
            for kind, probe in (("startup", start), ("liveness", live)):
                if probe.get("httpGet", {}).get("path") not in (None, "/livez"):
                    yield f"{pod.name}: {kind} must ask /livez, which looks at nothing"
            if ready.get("httpGet", {}).get("path") not in (None, "/readyz"):
                yield f"{pod.name}: readiness must ask /readyz"
            if _patience_s(start) < START_BUDGET_S:
                yield f"{pod.name}: has {_patience_s(start)} s to start, less than {START_BUDGET_S}"
            if _patience_s(ready) >= _patience_s(live):
                yield f"{pod.name}: is restarted before it is taken out"


def _patience_s(probe: Doc) -> int:
    return int(probe.get("periodSeconds", 10)) * int(probe.get("failureThreshold", 3))


def tokens(docs: list[Doc]) -> Iterator[str]:
    """Nothing here talks to the API server."""
    for doc in of_kind(docs, "ServiceAccount"):
        if doc.get("automountServiceAccountToken") is not False:
            yield f"{name_of(doc)}: mounts its token"
    for pod in pods(docs):
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name}: mounts a token"


def hardening(docs: list[Doc]) -> Iterator[str]:
    """What the level `restricted` asks for, and a root file system that can't be written."""
    for pod in pods(docs):
        context = pod.spec.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield f"{pod.name}: may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod.name}: no seccomp profile"
        if {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys():
            yield f"{pod.name}: shares its node's namespaces"
        for volume in pod.spec.get("volumes", []):
            if "hostPath" in volume:
                yield f"{pod.name}: sees files of its node"
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{pod.name}: {volume['name']} may fill the node's disk"
        for container in pod.containers:
            yield from (f"{pod.name}: {fault}" for fault in _soft(container, context))


def _soft(container: Doc, context: Doc) -> Iterator[str]:
    own = container.get("securityContext", {})
    if own.get("allowPrivilegeEscalation") is not False:
        yield "may become root"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "may write its root file system"
    if own.get("capabilities") != {"drop": ["ALL"]}:
        yield "keeps capabilities"
    if "/tmp" not in [mount["mountPath"] for mount in container.get("volumeMounts", [])]:
        yield "has no /tmp to write to"
    user = Dockerfile(TEXT).last("service", "USER")
    if is_ours(container) and f"{context.get('runAsUser')}:{context.get('runAsGroup')}" != user:
        yield f"does not run as {user}, as its image does"


def cronjobs(docs: list[Doc]) -> Iterator[str]:
    """A job is never doubled, never late, never endless, and tried again where that is harmless."""
    for job in of_kind(docs, "CronJob"):
        spec, run = job["spec"], job["spec"]["jobTemplate"]["spec"]
        if spec.get("concurrencyPolicy") != "Forbid":
            yield f"{name_of(job)}: may run twice at once"
        if spec.get("timeZone") != "Etc/UTC":
            yield f"{name_of(job)}: in which time zone?"
        for field in ("startingDeadlineSeconds", "successfulJobsHistoryLimit"):
            if field not in spec:
                yield f"{name_of(job)}: no {field}"
        for field in ("activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"):
            if field not in run:
                yield f"{name_of(job)}: no {field}"
        if run["template"]["spec"].get("restartPolicy") != "Never":
            yield f"{name_of(job)}: restarts in place, out of sight of its backoffLimit"
        yield from _late(job)
        args = run["template"]["spec"]["containers"][0]["args"]
        if args == ["rollback"] and not (spec.get("suspend") and run.get("backoffLimit") == 0):
            yield f"{name_of(job)}: rolls back twice, which is forward again"


def _late(job: Doc) -> Iterator[str]:
    """An update is for the day on which it starts, so it has to end on that day."""
    spec = job["spec"]
    minute, hour = (int(part) for part in spec["schedule"].split()[:2])
    waits_s = spec.get("startingDeadlineSeconds", 0)
    runs_s = spec["jobTemplate"]["spec"].get("activeDeadlineSeconds", 0)
    if name_of(job).startswith("update-") and hour * 3600 + minute * 60 + waits_s + runs_s >= 86400:
        yield f"{name_of(job)}: may go on after midnight"


def nodes(docs: list[Doc]) -> Iterator[str]:
    """Of a job on several nodes each knows how many they are, which one it is, and the first."""
    for pod in (pod for pod in pods(docs) if pod.owner["kind"] == "Job"):
        spec, args = pod.owner["spec"], pod.containers[0]["args"]
        given = dict(arg.removeprefix("--").split("=") for arg in args if "=" in arg)
        if {spec["completions"], spec["parallelism"]} != {int(given["nnodes"])}:
            yield f"{pod.name}: not as many pods at once as nodes"
        if given["node-rank"] != "$(JOB_COMPLETION_INDEX)" or spec["completionMode"] != "Indexed":
            yield f"{pod.name}: a node does not know which one it is"
        if given["master-addr"] != f"{name_of(pod.owner)}-0.{pod.spec.get('subdomain')}":
            yield f"{pod.name}: {given['master-addr']} is not the first node"
        if int(given["master-port"]) not in _ports(pod).values():
            yield f"{pod.name}: no pod opens {given['master-port']}"
        if int(given["nproc-per-node"]) > cpus(pod.containers[0]["resources"]["requests"]["cpu"]):
            yield f"{pod.name}: more processes than cores"
        if not {"activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"} <= spec.keys():
            yield f"{pod.name}: has no end"


def environment(docs: list[Doc]) -> Iterator[str]:
    """Every variable is one that something reads, and the service accepts the values of its own."""
    ours = "\n".join(
        (ROOT / path).read_text()
        for path in ("ecdctr.py", "training/distributed.py", "service/settings.py")
    )
    for pod in pods(docs):
        for container in filter(is_ours, pod.containers):
            for name in env_names(docs, container):
                is_read = f'"{name}"' in ours or name in (*THREADS, *OF_S3)
                if not is_read:
                    yield f"{pod.name}: nothing reads {name}"
            if pod.owner["kind"] == "Deployment":
                yield from (f"{pod.name}: {fault}" for fault in _refused(docs, container))
            elif _is_remote(docs, _service(docs)) and not _is_remote(docs, container):
                yield f"{pod.name}: has another registry than the service"


def _refused(docs: list[Doc], container: Doc) -> Iterator[str]:
    values = env_values(docs, container)
    known = {f"ECDCTR_{field.name.upper()}" for field in fields(Settings)}
    yield from (
        f"no setting is called {n}" for n in sorted(values.keys() - known - {*THREADS, *OF_S3})
    )
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    if "://" in (where := values.get("ECDCTR_REGISTRY", "")):
        where = values.get("ECDCTR_REGISTRY_CACHE", "")
        values["ECDCTR_REGISTRY_CACHE"] = str(ROOT)
    if not any(f"{where}/".startswith(f"{folder}/") for folder in mounted):
        yield f"its registry, or what is fetched from it, is in {where!r}, which is not mounted"
    try:
        Settings.from_env({**values, "ECDCTR_REGISTRY": str(ROOT)})
    except SettingsError as error:
        yield str(error)


def commands(docs: list[Doc]) -> Iterator[str]:
    """The command line understands what it is given, and the update knows its day."""
    for pod in pods(docs):
        for container in filter(is_ours, pod.containers):
            try:
                options = parsed(pod, container)
            except SystemExit:
                yield f"{pod.name}: ecdctr does not take {container['args']}"
                continue
            needs_torch = options.run.__name__ in ("_update", "_import", "_train_cpm")
            if needs_torch != ("ecdctr-training" in container["image"]):
                yield f"{pod.name}: {container['image']} is the wrong image"


def parsed(pod: Pod, container: Doc) -> Any:
    """A container's arguments as the command line understands them."""
    args = [re.sub(r"\$\((\w+)\)", r"\1", arg) for arg in container["args"]]
    command = container.get("command", [])
    if command == ["torchrun"]:
        args = args[args.index("ecdctr") + 1 :]
    elif command:
        raise AssertionError(f"{pod.name}: what does {command} do?")
    return ecdctr.parser().parse_args(args)


def ports(docs: list[Doc]) -> Iterator[str]:
    """Every port that is named is opened by who is meant."""
    everything = list(pods(docs))
    for pod in everything:
        for container in pod.containers:
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                for how in container.get(kind, {}).values():
                    if isinstance(how, dict) and how["port"] not in _ports(pod):
                        yield f"{pod.name}: {kind} asks port {how['port']}"
            if pod.owner["kind"] == "Deployment":
                listens = parsed(pod, container)
                if (listens.host, listens.port) != ("0.0.0.0", _ports(pod).get("http")):
                    yield f"{pod.name}: listens on {listens.host}:{listens.port}"
    for service in of_kind(docs, "Service"):
        chosen = [p for p in everything if selects(service["spec"]["selector"], p.labels)]
        for port in service["spec"]["ports"]:
            if not all(port["targetPort"] in _ports(pod) for pod in chosen):
                yield f"{name_of(service)}: no pod opens {port['targetPort']}"
    for policy in of_kind(docs, "NetworkPolicy"):
        chosen = [p for p in everything if selects(policy["spec"]["podSelector"], p.labels)]
        for rule in policy["spec"].get("ingress", []):
            for port in rule.get("ports", []):
                if not all(port["port"] in _ports(pod) for pod in chosen):
                    yield f"{name_of(policy)}: no pod opens {port['port']}"


def _ports(pod: Pod) -> dict[str, int]:
    return {p["name"]: p["containerPort"] for c in pod.containers for p in c.get("ports", [])}


def shutdown(docs: list[Doc]) -> Iterator[str]:
    """A request that has come in is answered before the process is killed."""
    for pod in (pod for pod in pods(docs) if pod.owner["kind"] == "Deployment"):
        for container in pod.containers:
            hook = container.get("lifecycle", {}).get("preStop", {})
            waits_s = hook.get("sleep", {}).get("seconds", 0)
            if waits_s < 5:
                yield f"{pod.name}: stops listening before it is out of the Service"
            if waits_s + GRACE_S + CLOSE_S > pod.spec.get("terminationGracePeriodSeconds", 30):
                yield f"{pod.name}: is killed within the {GRACE_S} s that requests may take"


def workspace(docs: list[Doc]) -> Iterator[str]:
    """Training on some node writes what the service on any node reads."""
    claim = named(docs, "PersistentVolumeClaim/workspace")
    if claim["spec"]["accessModes"] != ["ReadWriteMany"]:
        yield "the workspace can't be mounted on several nodes"
    for pod in pods(docs):
        for container in pod.containers:
            mounts = {mount["name"]: mount for mount in container.get("volumeMounts", [])}
            is_reader = pod.owner["kind"] == "Deployment"
            mount = mounts.get("workspace")
            if is_reader and not mount and _is_remote(docs, container):
                continue
            if is_ours(container) and (not mount or mount["mountPath"] != "/workspace"):
                yield f"{pod.name}: has no workspace"
            elif mount and bool(mount.get("readOnly")) != is_reader:
                yield f"{pod.name}: its workspace must be {'read-only' if is_reader else 'written'}"


def _service(docs: list[Doc]) -> Doc:
    deployment = named(docs, "Deployment/ecdctr")
    container: Doc = deployment["spec"]["template"]["spec"]["containers"][0]
    return container


def _is_remote(docs: list[Doc], container: Doc) -> bool:
    return "://" in env_values(docs, container).get("ECDCTR_REGISTRY", "")


def store(docs: list[Doc]) -> Iterator[str]:
    """Redis keeps what it has, on disk and in memory, and has the memory for it."""
    for pod in (pod for pod in pods(docs) if pod.owner["kind"] == "StatefulSet"):
        name = next(v["configMap"]["name"] for v in pod.spec["volumes"] if "configMap" in v)
        settings = dict(
            line.split(maxsplit=1)
            for line in config_map(docs, name)["data"]["valkey.conf"].splitlines()
            if not line.startswith("#")
        )
        if settings.get("maxmemory-policy") != "noeviction":
            yield f"{pod.name}: may evict parts of a window"
        if settings.get("appendonly") != "yes":
            yield f"{pod.name}: forgets all when it restarts"
        limit = num_bytes(pod.containers[0]["resources"]["limits"]["memory"])
        if not 0 < int(settings.get("maxmemory", "0gb")[:-2]) * 2**30 <= limit / 1.4:
            yield f"{pod.name}: maxmemory leaves too little of its {limit >> 20} MiB"
        if not pod.owner["spec"].get("volumeClaimTemplates"):
            yield f"{pod.name}: has no disk"


def monitoring(docs: list[Doc]) -> Iterator[str]:
    """Alerts are about metrics that exist and say where to read on; something is scraped."""
    known = metric_names() | {rule["record"] for rule in _rules(docs) if "record" in rule}
    for rule in _rules(docs):
        name = rule.get("alert") or rule.get("record")
        for metric in sorted(set(re.findall(r"\becdctr_\w+", rule["expr"])) - known):
            yield f"{name}: there is no metric {metric}"
        if "alert" not in rule:
            continue
        if rule.get("labels", {}).get("severity") not in ("page", "ticket"):
            yield f"{name}: page or ticket?"
        notes = rule.get("annotations", {})
        if not notes.get("summary"):
            yield f"{name}: says nothing"
        if notes.get("runbook_url") != f"docs/runbook.md#{str(name).lower()}":
            yield f"{name}: its runbook_url is not docs/runbook.md#{str(name).lower()}"
    for monitor in of_kind(docs, "ServiceMonitor"):
        chosen = [
            service
            for service in of_kind(docs, "Service")
            if selects(monitor["spec"]["selector"], service["metadata"].get("labels", {}))
        ]
        there = {port["name"] for service in chosen for port in service["spec"]["ports"]}
        for endpoint in monitor["spec"]["endpoints"]:
            if endpoint["port"] not in there or endpoint["path"] != "/metrics":
                yield f"{name_of(monitor)}: scrapes {endpoint['port']}{endpoint['path']}"


def namespaces(docs: list[Doc]) -> Iterator[str]:
    """All is in one namespace, in which pods of less than level `restricted` are refused."""
    for namespace in of_kind(docs, "Namespace"):
        labels = namespace["metadata"].get("labels", {})
        if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"{name_of(namespace)}: takes any pod"
        for doc in docs:
            if doc is not namespace and doc["metadata"].get("namespace") != name_of(namespace):
                yield f"{doc['kind']}/{name_of(doc)}: is not in {name_of(namespace)}"


def name_of(doc: Doc) -> str:
    return str(doc["metadata"]["name"])


def _rules(docs: list[Doc]) -> list[Doc]:
    found = of_kind(docs, "PrometheusRule")
    return [rule for doc in found for group in doc["spec"]["groups"] for rule in group["rules"]]


def config_map(docs: list[Doc], name: str) -> Doc:
    return next(doc for doc in of_kind(docs, "ConfigMap") if name_of(doc) == name)


def is_ours(container: Doc) -> bool:
    return "ecdctr-" in container["image"]


def env_names(docs: list[Doc], container: Doc) -> list[str]:
    return list(env_values(docs, container))


def env_values(docs: list[Doc], container: Doc) -> dict[str, str]:
    """Variables of a container; those from a secret are a path."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= config_map(docs, source["configMapRef"]["name"])["data"]
    for variable in container.get("env", []):
        found[variable["name"]] = variable.get("value", "/secret")
    return found


@cache
def metric_names() -> set[str]:
    """As they are scraped."""
    registry = CollectorRegistry()
    Metrics(registry)
    ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {family.name + end for family in registry.collect() for end in ends[family.type]}


CHECKS: tuple[Check, ...] = (
    images,
    resources,
    threads,
    autoscaling,
    selectors,
    disruption,
    network,
    references,
    probes,
    tokens,
    hardening,
    cronjobs,
    nodes,
    environment,
    commands,
    ports,
    shutdown,
    workspace,
    store,
    monitoring,
    namespaces,
)

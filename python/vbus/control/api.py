"""The control API's routes: each is one call on a `Bus`, described once for the server and for its OpenAPI document."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import anyio.to_thread
import pydantic
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

import vbus
from vbus import config, hints
from vbus.bus import Bus, Channel
from vbus.bus.limits import MEMBER_LIMITS
from vbus.channel import MAX_EVENT
from vbus.control import models
from vbus.errors import Error, NoSuchNameError, UsageError
from vbus.options import OptionErrors

log = logging.getLogger("vbus.control")

MAX_WATCHED = 1024
"""Events that wait for one who watches a channel."""
WATCH_SECONDS = 0.5
"""How often a silent channel is asked whether it is closed."""
MAX_BODY = 64 << 10
"""Bytes of a request's body."""
KINDS = {403: "not-allowed", 404: "no-such-name", 413: "too-large", 503: "busy"}
DID_YOU_MEAN = re.compile(r"did you mean '([^']+)'")


@dataclass(frozen=True)
class Call:
    """What a handler gets: names in the path, words of the query, the checked body."""

    bus: Bus
    path: dict[str, str]
    query: dict[str, str]
    body: Any


@dataclass(frozen=True)
class Endpoint:
    """One verb on one path. `handler` runs in a thread, for a bus may take its time."""

    method: str
    path: str
    name: str
    summary: str
    handler: Callable[[Call], Any]
    answer: Any
    """The model of the answer's body, or a list of one, or None for any object."""
    body: type[models.Model] | None = None
    query: tuple[str, ...] = ()
    status: int = 200


def _bus(call: Call) -> dict[str, Any]:
    bus = call.bus
    return {
        "name": bus.name,
        "uuid": bus.uuid,
        "members": bus.members.names,
        "max_sources": bus.max_sources,
        "pid": os.getpid(),
        "version": vbus.__version__,
    }


def _plug(call: Call) -> dict[str, Any]:
    bus, plug = call.bus, call.body
    directory = _directory(plug.directory)
    try:
        spec = config.device_spec(
            plug.type,
            plug.options,
            directory,
            name=plug.name,
            priority=plug.priority,
            uuid=plug.uuid,
            mask=plug.mask,
        )
    except OptionErrors as errors:
        raise UsageError("; ".join(f"options.{key}: {text}" for key, text in errors.problems)) from None
    config.check_carried(bus, plug.name)
    device = spec.plug(bus)
    return _row(bus, device.name)


def _directory(text: str | None) -> Path:
    """Where relative paths of a request begin. UsageError."""
    directory = Path(text) if text is not None else Path.cwd()
    if not directory.is_absolute():
        raise UsageError(f"directory {text!r}: write an absolute path")
    return directory


def _row(bus: Bus, name: str) -> dict[str, Any]:
    for row in bus.describe():
        if row["name"] == name:
            return row
    raise Error(f"device {name!r} was unplugged again already")


def _unplug(call: Call) -> dict[str, Any]:
    name = call.path["name"]
    surprise = call.query.get("surprise", "false")
    if surprise not in ("true", "false"):
        raise UsageError(f"surprise={surprise}: write true or false")
    ended = call.bus.unplug(name, surprise=surprise == "true")
    return {"bus": call.bus.name, "name": name, "ended": ended}


def _set(call: Call) -> dict[str, Any]:
    bus, name = call.bus, call.path["name"]
    values = call.body
    if not isinstance(values, dict) or not values:
        raise UsageError("write an object of attributes and their values")
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    known = bus.attributes(name)
    # Unknown names first, so that a mistake in the second does not leave the first one set.
    return {key: bus.set(name, key, text) for key, text in sorted(texts.items(), key=lambda item: item[0] in known)}


def _set_member(call: Call) -> dict[str, Any]:
    bus, name = call.bus, call.path["name"]
    values = call.body
    if not isinstance(values, dict) or not values:
        raise UsageError("write an object of limits and their values")
    known = {f"limit.{limit}" for limit in MEMBER_LIMITS}
    for key in values:
        if key not in known:
            raise NoSuchNameError(hints.no_such("limit", key, known, "a member"))
    return {key: bus.set_member(name, key, str(value)) for key, value in values.items()}


def _open_channel(call: Call) -> dict[str, Any]:
    wanted = call.body
    call.bus.open_channel(wanted.name, priority=wanted.priority, memory=wanted.memory, relay=wanted.relay)
    return call.bus.channel(wanted.name).describe()


def _close_channel(call: Call) -> dict[str, Any]:
    channel = call.bus.channel(call.path["name"])
    channel.close("an operator closed it")
    return {"bus": call.bus.name, "name": channel.name}


def _say(call: Call) -> dict[str, Any]:
    channel, said = call.bus.channel(call.path["name"]), call.body
    if (said.text is None) == (said.hex is None):
        raise UsageError("write either text or hex")
    try:
        data = bytes.fromhex(said.hex) if said.hex is not None else said.text.encode()
    except ValueError:
        raise UsageError("hex: write an even number of hexadecimal digits") from None
    if len(data) > MAX_EVENT:
        raise UsageError(f"an event of {len(data)} bytes; {MAX_EVENT} are the most")
    return {"bus": call.bus.name, "channel": channel.name, "drivers": channel.send(data)}


def _connect(call: Call) -> dict[str, Any]:
    bus, wanted = call.bus, call.body
    try:
        spec = config.connector_spec(wanted.type, wanted.options, _directory(wanted.directory), name=wanted.name)
        connector = spec.bind(bus)
    except OptionErrors as errors:
        raise UsageError("; ".join(f"options.{key}: {text}" for key, text in errors.problems)) from None
    except OSError as error:
        raise UsageError(f"the connector cannot be had: {error.strerror or error}") from None
    for row in bus.describe_connectors():
        if row["name"] == connector.name:
            return row
    raise Error(f"connector {connector.name!r} was taken away again already")


def _disconnect(call: Call) -> dict[str, Any]:
    name = call.path["name"]
    call.bus.disconnect(name)
    return {"bus": call.bus.name, "name": name}


def _stat(call: Call) -> list[dict[str, Any]]:
    rows = call.bus.stat()
    device = call.query.get("device")
    if device is None:
        return rows
    call.bus.slot(device)
    return [row for row in rows if row["device"] == device]


ENDPOINTS = (
    Endpoint("GET", "/v1/bus", "bus", "The bus and its process.", _bus, models.BusInfo),
    Endpoint(
        "GET", "/v1/devices", "devices", "Every device.", lambda call: call.bus.describe(), list[models.DeviceRow]
    ),
    Endpoint("POST", "/v1/devices", "plug", "Plug a device.", _plug, models.DeviceRow, body=models.Plug, status=201),
    Endpoint(
        "GET",
        "/v1/devices/{name}",
        "show",
        "Everything about a device.",
        lambda call: call.bus.show(call.path["name"]),
        models.DeviceDetails,
    ),
    Endpoint(
        "DELETE",
        "/v1/devices/{name}",
        "unplug",
        "Unplug a device; with surprise=true, without waiting for requests under way.",
        _unplug,
        models.Unplugged,
        query=("surprise",),
    ),
    Endpoint(
        "PATCH", "/v1/devices/{name}/attributes", "set", "Set attributes; the answer has their new values.", _set, None
    ),
    Endpoint(
        "GET",
        "/v1/channels",
        "channels",
        "Every event channel, and who has it open.",
        lambda call: call.bus.describe_channels(),
        list[models.ChannelRow],
    ),
    Endpoint(
        "POST",
        "/v1/channels",
        "open_channel",
        "Open an event channel.",
        _open_channel,
        models.ChannelRow,
        body=models.OpenChannel,
        status=201,
    ),
    Endpoint(
        "DELETE", "/v1/channels/{name}", "close_channel", "Close a channel.", _close_channel, models.ClosedChannel
    ),
    Endpoint(
        "POST",
        "/v1/channels/{name}/events",
        "say",
        "Say something to every driver that has the channel open.",
        _say,
        models.Heard,
        body=models.Said,
    ),
    Endpoint(
        "GET",
        "/v1/members",
        "members",
        "Members that have limits, or are here.",
        lambda call: call.bus.describe_members(),
        list[models.MemberRow],
    ),
    Endpoint(
        "PATCH",
        "/v1/members/{name}/limits",
        "set_member",
        "Set limits of a member; the answer has their new values.",
        _set_member,
        None,
    ),
    Endpoint("GET", "/v1/stat", "stat", "Counters of every queue.", _stat, list[models.StatRow], query=("device",)),
    Endpoint(
        "GET",
        "/v1/connectors",
        "connectors",
        "Every connector, its drivers, and why others went.",
        lambda call: call.bus.describe_connectors(),
        list[models.ConnectorRow],
    ),
    Endpoint(
        "POST",
        "/v1/connectors",
        "connect",
        "Make a connector, and let drivers come through it.",
        _connect,
        models.ConnectorRow,
        body=models.Connect,
        status=201,
    ),
    Endpoint(
        "DELETE",
        "/v1/connectors/{name}",
        "disconnect",
        "Part from a connector and its drivers.",
        _disconnect,
        models.Disconnected,
    ),
)


def make_app(bus: Bus) -> Starlette:
    """The application that serves one bus."""
    routes = [Route(e.path, functools.partial(_serve, e, bus), methods=[e.method], name=e.name) for e in ENDPOINTS]

    async def document(request: Request) -> Response:
        return _json(200, openapi())

    async def watch(request: Request) -> Response:
        try:
            channel = bus.channel(request.path_params["name"])
        except NoSuchNameError as error:
            return _problem(404, str(error))
        return StreamingResponse(_events(channel), media_type="application/x-ndjson")

    routes.append(Route("/v1/channels/{name}/events", watch, methods=["GET"], name="watch"))
    routes.append(Route("/openapi.json", document, methods=["GET"]))
    return Starlette(routes=_by_path(routes), exception_handlers={HTTPException: _http_problem, Exception: _unexpected})


async def _events(channel: Channel) -> AsyncIterator[bytes]:
    """What is said on a channel, a line of JSON each, until it is closed. A slow reader misses some, and is told."""
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MAX_WATCHED)
    missed = 0

    def put(row: dict[str, Any]) -> None:
        nonlocal missed
        try:
            waiting.put_nowait(row)
        except asyncio.QueueFull:
            missed += 1

    def tap(direction: str, driver: str, data: bytes) -> None:
        row = {
            "time": time.time(),
            "direction": direction,
            "driver": driver,
            "text": _printable(data),
            "hex": data.hex(),
        }
        if not loop.is_closed():
            loop.call_soon_threadsafe(put, row)

    end = channel.tap(tap)
    try:
        # The headers go at once, so that whoever watches knows that nothing is missed from here on.
        yield b"\n"
        while not (channel.closed and waiting.empty()):
            try:
                row = await asyncio.wait_for(waiting.get(), WATCH_SECONDS)
            except TimeoutError:
                continue
            if missed:
                row |= {"missed": missed}
                missed = 0
            yield json.dumps(row).encode() + b"\n"
    finally:
        end()


def _printable(data: bytes) -> str | None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() else None


def _by_path(routes: list[Route]) -> list[Route]:
    """One route a path, so that a wrong method is answered with those that there are."""
    paths: dict[str, dict[str, Route]] = {}
    for route in routes:
        paths.setdefault(route.path, {}).update(dict.fromkeys(route.methods or (), route))

    def choose(methods: dict[str, Route]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            response: Response = await methods[request.method].endpoint(request)
            return response

        return endpoint

    return [Route(path, choose(methods), methods=list(methods)) for path, methods in paths.items()]


async def _serve(endpoint: Endpoint, bus: Bus, request: Request) -> Response:
    """Check a request, call the handler in a thread, check the answer."""
    try:
        body = _checked_body(endpoint, await _read(request))
        unknown = set(request.query_params) - set(endpoint.query)
        if unknown:
            raise UsageError(f"unknown {min(unknown)!r} in the query: there is {', '.join(endpoint.query) or 'none'}")
        call = Call(bus, dict(request.path_params), dict(request.query_params), body)
        answer = await anyio.to_thread.run_sync(endpoint.handler, call, abandon_on_cancel=True)
        return _json(endpoint.status, _checked_answer(endpoint, answer))
    except NoSuchNameError as error:
        return _problem(404, str(error))
    except UsageError as error:
        return _problem(400, str(error))
    except Error as error:
        return _problem(500, str(error))


async def _read(request: Request) -> bytes:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY:
            raise HTTPException(413, f"the body has over {MAX_BODY} bytes")
    return data


def _checked_body(endpoint: Endpoint, data: bytes) -> Any:
    if endpoint.method not in ("POST", "PATCH"):
        return None
    try:
        if endpoint.body is None:
            return json.loads(data)
        return endpoint.body.model_validate_json(data)
    except pydantic.ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in detail["loc"])
        raise UsageError(f"{where + ': ' if where else ''}{detail['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the body is no JSON: {error}") from None


def _checked_answer(endpoint: Endpoint, answer: Any) -> Any:
    if endpoint.answer is None:
        return answer
    model = get_args(endpoint.answer)
    if model:
        return [model[0].model_validate(row).model_dump(mode="python", by_alias=True) for row in answer]
    return endpoint.answer.model_validate(answer).model_dump(mode="python", by_alias=True)


def _json(status: int, value: Any) -> Response:
    text = json.dumps(value, default=_plain, ensure_ascii=False)
    return Response(text.encode("utf-8", "backslashreplace"), status, media_type="application/json")


def _plain(value: object) -> str:
    """An attribute of a device may be anything."""
    return value.hex() if isinstance(value, bytes | bytearray | memoryview) else str(value)


def _problem(status: int, text: str, kind: str | None = None, headers: Any = None) -> Response:
    near = DID_YOU_MEAN.search(text)
    kind = kind or KINDS.get(status, "usage" if status < 500 else "failed")
    problem = {"error": " ".join(text.split()), "kind": kind} | ({"did_you_mean": near[1]} if near else {})
    response = _json(status, problem)
    response.headers.update(headers or {})
    return response


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text, kind = error.detail, None
    if error.status_code in (404, 405):
        text, kind = f"{request.method} {request.url.path} is no call: see /openapi.json", "usage"
    return _problem(error.status_code, text, kind, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    # Starlette logs the traceback by raising it again behind this answer.
    return _problem(500, f"{type(error).__name__}: {error}; its traceback is in the log of the bus")


@functools.cache
def openapi() -> dict[str, Any]:
    """The OpenAPI document, made of the endpoints and their models."""
    kinds = sorted(set(_models()), key=lambda model: model.__name__)
    _, schema = models_json_schema(
        [(kind, "serialization") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    watched = (
        "What is said on a channel: a line of JSON each (time, direction, driver, text, hex; missed, when some were)."
    )
    paths["/v1/channels/{name}/events"]["get"] = {
        "operationId": "watch",
        "summary": watched,
        "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
        "responses": {
            "200": {"description": watched, "content": {"application/x-ndjson": {"schema": {"type": "string"}}}},
            "default": {"description": "What is wrong.", "content": _content(models.Problem)},
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "vbus control API", "version": "1", "description": (__doc__ or "").strip()},
        "paths": paths,
        "components": {"schemas": schema["$defs"]},
    }


def _models() -> Iterator[type[models.Model]]:
    yield models.Problem
    for endpoint in ENDPOINTS:
        if endpoint.body is not None:
            yield endpoint.body
        if endpoint.answer is not None:
            yield from get_args(endpoint.answer) or (endpoint.answer,)


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    names = re.findall(r"{(\w+)}", endpoint.path)
    operation: dict[str, Any] = {
        "operationId": endpoint.name,
        "summary": endpoint.summary,
        "parameters": [
            *({"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names),
            *({"name": n, "in": "query", "schema": {"type": "string"}} for n in endpoint.query),
        ],
        "responses": {
            str(endpoint.status): {"description": endpoint.summary, "content": _content(endpoint.answer)},
            "default": {"description": "What is wrong.", "content": _content(models.Problem)},
        },
    }
    if endpoint.method in ("POST", "PATCH"):
        operation["requestBody"] = {"required": True, "content": _content(endpoint.body)}
    return operation


def _content(model: Any) -> dict[str, Any]:
    inner = get_args(model)
    schema: dict[str, Any] = {"type": "object"}
    if inner:
        schema = {"type": "array", "items": {"$ref": f"#/components/schemas/{inner[0].__name__}"}}
    elif model is not None:
        schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"application/json": {"schema": schema}}

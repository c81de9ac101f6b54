"""The explorer with the language model behind it, on this machine: `kronsae explore RUN --serve`.

    GET  /           the page; the first visit has ?token=…, which a cookie then keeps
    GET  /labels     {latent: {text, by, detection}}
    POST /ask        {text}                         features of each token
    POST /generate   {prompt, edits, new_tokens}    the text without and with the edits
    POST /ablate     {text, latent}                 base, extension and composition silenced
    POST /labels     {labels: {latent: text}}       saved beside the run, with those there are

Answers are JSON; what cannot be done is {error}, with status 400. Everything needs the token and is
bounded in size. What needs the model is computed one after the other, for which labels do not wait.
Only this machine can connect, unless another `host` is asked for.
"""

import hashlib
import ipaddress
import json
import math
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kronsae.commandline import stop_of, stopped
from kronsae.config import DataConfig
from kronsae.data.language_model import LanguageModel
from kronsae.data.loading import quiet
from kronsae.data.packing import prompt_ids
from kronsae.errors import InputError
from kronsae.explore.content import make_content
from kronsae.explore.write import render
from kronsae.features import Features, TargetModel
from kronsae.features.model import Place
from kronsae.interventions.effects import factors
from kronsae.interventions.hooks import Edit, ablate, clamp, steer
from kronsae.model.sae import SAE
from kronsae.properties import Stored
from kronsae.properties.labels import FORMAT, Labels, labels_of, plain, write_labels
from kronsae.properties.run import say
from kronsae.system.documents import Keys, typed

if TYPE_CHECKING:
    from anyio import CapacityLimiter
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MAX_TEXT, MAX_BODY = 20_000, 1 << 24
"""Most characters of a text, and bytes of a request."""
MAX_TOKENS, MAX_NEW_TOKENS, MAX_EDITS = 512, 200, 64
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
"""Names of this machine for itself."""
OPEN_TO_OTHERS = (
    "--host {}: other machines can connect, and whoever has the token can use the model"
)
ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses of no machine, the way to which leads over this machine's own address."""
SHOWN_NEXT = 5
"""Next tokens that are shown."""

_ASK = Keys({"text": str})
_GENERATE = Keys({"prompt": str, "edits": list[dict[str, Any]]}, {"new_tokens": int})
_EDIT = Keys({"latent": int, "kind": str, "value": float})
_ABLATE = Keys({"text": str, "latent": int})
_LABELS = Keys({"labels": dict[str, str]})


class Answers:
    """What the page asks of the language model; each method takes and gives JSON values.

    file: labels.json, where labels are kept.  digest: the SHA-256 of the SAE's weights.
    """

    def __init__(
        self, lm: TargetModel, labels: Labels, file: Path, digest: str | None = None
    ) -> None:
        self.lm, self.sae = lm, lm.saes[0]
        self.known, self.file, self.digest = labels, file, digest
        self.longest = min(MAX_TOKENS, lm.places[0].model.max_context or MAX_TOKENS)

    def ask(self, request: Any) -> dict[str, Any]:
        """Of each token of the text: its text, and [latent, value] of its features by strength."""
        features = self._features(typed(request, _ASK, "")["text"])
        return {
            "tokens": features.tokens,
            "kept": features.kept.tolist(),
            "features": _rows(features),
        }

    def generate(self, request: Any) -> dict[str, Any]:
        """The continuation without and with the edits, and the likeliest next tokens of both."""
        asked = typed(request, _GENERATE, "")
        count = asked.get("new_tokens", 40)
        if not 1 <= count <= MAX_NEW_TOKENS:
            raise InputError(f"new_tokens: expected 1 to {MAX_NEW_TOKENS}, got {count}")
        if len(asked["edits"]) > MAX_EDITS:
            raise InputError(f"edits: expected at most {MAX_EDITS}, got {len(asked['edits'])}")
        prompt, edits = asked["prompt"], [_edit(edit) for edit in asked["edits"]]
        if (length := len(self._features(prompt))) < 2:
            raise InputError("prompt: expected two tokens at least: the first is never changed")
        room = (self.lm.places[0].model.max_context or length + count) - length
        if count > room:
            raise InputError(
                f"new_tokens: expected at most {room}, got {count}: the prompt has {length} "
                f"tokens, and the model reads {length + room}"
            )
        plain = self._continued(prompt, count)
        with self.lm.edit(edits):
            return {"plain": plain, "edited": self._continued(prompt, count)}

    def ablate(self, request: Any) -> dict[str, Any]:
        """The next tokens after the text: as it is, and without a latent, its base or extension."""
        asked = typed(request, _ABLATE, "")
        text, latent = asked["text"], asked["latent"]
        fires = self._features(text).of(latent).tolist()
        following = {"nothing": self._next(text)}
        for what in factors(self.sae, latent):
            with self.lm.silence(latent, what):
                following[what] = self._next(text)
        return {"fires": fires, "next": following}

    def labels(self, request: Any) -> dict[str, Any]:
        """Keep the texts of some labels, by latent; an empty one takes a label away."""
        texts = typed(request, _LABELS, "")["labels"]
        document = {"labels": {number: {"text": text} for number, text in texts.items()}}
        new = labels_of({"format": FORMAT, **document}, "labels", self.sae.dict_size, None)
        others = {f: label for f, label in self.known.items() if str(f) not in texts}
        self.known = others | new
        write_labels(self.known, self.file, self.digest)
        return {"saved": len(self.known)}

    def _features(self, text: str) -> Features:
        if len(text) > MAX_TEXT:
            raise InputError(f"text: expected at most {MAX_TEXT:,} characters, got {len(text):,}")
        length = len(prompt_ids(self.lm.tokenizer, text, self.lm.bos))
        if length > self.longest:
            raise InputError(f"text: expected at most {self.longest} tokens, got {length}")
        return self.lm.features(text)

    def _continued(self, prompt: str, count: int) -> dict[str, Any]:
        return {"text": self.lm.generate(prompt, count), "next": self._next(prompt)}

    def _next(self, text: str) -> list[list[Any]]:
        table = self.lm.next_tokens(text, SHOWN_NEXT)
        return table[["token", "probability"]].to_numpy().tolist()


def _rows(features: Features) -> list[list[list[float]]]:
    rows: list[list[list[float]]] = [[] for _ in features.tokens]
    ordered = features.to_pandas().sort_values("value", ascending=False, kind="stable")
    for row in ordered.itertuples():
        rows[row.position].append([row.latent, row.value])
    return rows


EDITS: dict[str, Callable[[int, float], Edit]] = {
    "steer": steer,
    "clamp": clamp,
    "ablate": lambda latent, _value: ablate(latent),
}


def _edit(given: dict[str, Any]) -> Edit:
    edit = typed(given, _EDIT, "edits")
    if edit["kind"] not in EDITS:
        raise InputError(f"edits: expected a kind of {', '.join(EDITS)}, got {edit['kind']!r}")
    if not math.isfinite(edit["value"]):
        raise InputError(f"edits: expected a finite value, got {edit['value']}")
    return EDITS[edit["kind"]](edit["latent"], edit["value"])


def app(
    page: str, answers: Answers, token: str, hosts: Sequence[str], model_free: "CapacityLimiter"
) -> "Starlette":
    """The server's application.

    hosts: names by which it may be asked for; those of another site are refused, also if they lead
        to this machine.
    model_free: lets one computation in at a time.
    """
    from anyio.to_thread import run_sync
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse
    from starlette.routing import Route

    # Browsers keep cookies by host alone: two servers need two names.
    cookie = f"kronsae-{hashlib.sha256(token.encode()).hexdigest()[:12]}"

    def allowed(given: str | None) -> bool:
        return given is not None and secrets.compare_digest(given.encode(), token.encode())

    async def index(request: "Request") -> "Response":
        if allowed(request.query_params.get("token")):
            response: Response = RedirectResponse("/")
            response.set_cookie(cookie, token, httponly=True, samesite="strict")
            return response
        if not allowed(request.cookies.get(cookie)):
            refused = (
                "Open the address that the command printed: its token is missing or wrong here."
            )
            return HTMLResponse(f"<!doctype html><title>kronsae</title><p>{refused}", 403)
        return HTMLResponse(page, headers={"Cache-Control": "no-store"})

    def route(name: str) -> Route:
        answer = getattr(answers, name)

        async def answered(body: bytes) -> dict[str, Any]:
            request = json.loads(body)
            if name == "labels":
                return answer(request)
            return await run_sync(answer, request, limiter=model_free)

        async def handle(request: "Request") -> "Response":
            if not allowed(request.cookies.get(cookie)) or not _is_own(request):
                return JSONResponse({"error": "no token, or another site's request"}, 403)
            if not request.headers.get("content-type", "").startswith("application/json"):
                return JSONResponse({"error": "expected JSON"}, 415)
            if (body := await _body(request)) is None:
                return JSONResponse({"error": f"expected at most {MAX_BODY:,} bytes"}, 413)
            try:
                return JSONResponse(await answered(body))
            except (InputError, ValueError, RecursionError) as error:
                return JSONResponse({"error": str(error)}, 400)

        return Route(f"/{name}", handle, methods=["POST"])

    async def labels(request: "Request") -> "Response":
        if not allowed(request.cookies.get(cookie)):
            return JSONResponse({"error": "no token"}, 403)
        return JSONResponse(plain(answers.known))

    names = ("ask", "generate", "ablate", "labels")
    pages = [Route("/", index), Route("/labels", labels, methods=["GET"])]
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return Starlette(routes=[*pages, *map(route, names)], middleware=[trusted])


def serve_run(
    run: Path,
    sae: SAE,
    stored: Stored,
    tokenizer: Any,
    activations: DataConfig | None,
    labels: Labels,
    data: DataConfig,
    file: Path,
    door: socket.socket,
) -> None:
    """Serve the page of a run, whose language model and text `data` names; see `serve`.

    file: labels.json.  door: see `bound`.  The others are those of `write_explorer`.
    Raises InputError for a model without a tokenizer, or of which no text can be generated.
    """
    with quiet():
        model = LanguageModel.of(data, sae.W_dec.device)
    if model.tokenizer is None or model.no_cross_entropy is not None:
        raise InputError(f"--serve: {model.no_cross_entropy or 'the model has no tokenizer'}")
    content = make_content(run, sae, stored, tokenizer, activations)
    answers = Answers(
        TargetModel([Place(sae, model, data)]), labels, file, stored.facts.get("sae_sha256")
    )
    served = {"served": True, "mostTokens": MAX_NEW_TOKENS, "longestText": answers.longest}
    content["facts"] |= served
    serve(render(content, connect="'self'"), answers, door, say)


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket with the address to serve on, which nobody else can take.

    host: another one than that of LOOPBACK lets other machines connect.  port: 0 takes a free one.
    Raises InputError if the address cannot be had, or if the packages of the extra are missing.
    """
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            "--serve needs uvicorn and starlette: pip install 'kronsae[serve]'"
        ) from error
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((host, port))
            door.listen()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "expected a port from 0 to 65535"
            raise InputError(f"--serve: {host}, port {port}: {reason}") from error
        yield door


def serve(page: str, answers: Answers, door: socket.socket, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C; the address is said once it can be opened.

    door: see `bound`.
    """
    import uvicorn
    from anyio import CapacityLimiter

    model_free = CapacityLimiter(1)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if model_free.borrowed_tokens:  # by a thread, for which Python would wait
                print(stopped(stop_of(sig)), file=sys.stderr, flush=True)
                os._exit(128 + sig)
            super().handle_exit(sig, frame)

    token, (host, port) = secrets.token_urlsafe(24), door.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if not address.is_loopback:
        print(OPEN_TO_OTHERS.format(host), file=sys.stderr)
    if address.is_unspecified:
        host = _own_address(door.family)
    shown = f"[{host}]" if ":" in host else host
    say(f"Open this in a browser (Ctrl-C ends it):\nhttp://{shown}:{port}/?token={token}")
    hosts = LOOPBACK if address.is_loopback else ("*",)
    served = app(page, answers, token, hosts, model_free)
    Server(uvicorn.Config(served, log_level="warning")).run(sockets=[door])


def _own_address(family: socket.AddressFamily) -> str:
    """The address of this machine for others; its name if it is on no network."""
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((ELSEWHERE[family], 9))  # which sends nothing
        return probe.getsockname()[0]
    return socket.gethostname()


async def _body(request: "Request") -> bytes | None:
    """A request's body; None if it is too long.

    It is read to its end all the same: a connection that is closed before is reset.
    """
    body = bytearray()
    length = 0
    async for part in request.stream():
        length += len(part)
        if length <= MAX_BODY:
            body += part
    return bytes(body) if length <= MAX_BODY else None


def _is_own(request: "Request") -> bool:
    """Whether a request comes from the page, as far as its headers say."""
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")

"""The page's server: its files, the index as JSON, labels, and the model."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from anyio import to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from olmoscope.browse.about import about_payload, summary_payload
from olmoscope.browse.collection import Shown, one_of
from olmoscope.browse.documents import CARD, REPORT, card_path, report
from olmoscope.browse.page_files import PageFiles
from olmoscope.browse.payload import feature_payload, figure_columns, window_payload
from olmoscope.browse.requests import (
    ImportBody,
    LabelBody,
    PromptBody,
    SteerBody,
    VerdictBody,
    parse_body,
    parse_query,
)
from olmoscope.browse.security import OnlyThisMachine
from olmoscope.errors import UserError
from olmoscope.evaluate.report import report_policy
from olmoscope.features.steer import Edit
from olmoscope.seeds import generator

WIDEST = 400
"""Tokens on each side of an example that a page may ask for."""


class _Api:
    """The answers. Worker threads read, since SQLite, DuckDB and memory maps block."""

    def __init__(self, collection: dict[str, Shown]) -> None:
        self.collection = collection

    def _shown(self, request: Request) -> Shown:
        return one_of(self.collection, request.path_params["sae"])

    def saes(self, request: Request) -> Response:
        return _json({"saes": [summary_payload(one) for one in self.collection.values()], "live": True})

    def about(self, request: Request) -> Response:
        return _json(about_payload(self._shown(request)))

    def report(self, request: Request) -> Response:
        return HTMLResponse(report(self._shown(request)), headers={
            "content-security-policy": f"{report_policy()}; frame-ancestors 'none'"})

    def card(self, request: Request) -> Response:
        path = card_path(self._shown(request))
        if path is None:
            raise UserError("there is no model card: the SAE is not part of a release")
        return PlainTextResponse(path.read_text(encoding="utf-8"))

    def features(self, request: Request) -> Response:
        shown, query = self._shown(request), parse_query(request.query_params)
        page = query.listing().page(shown, query.offset, query.limit)
        labels, figures = shown.label_texts(), shown.label_figures()
        return _json({"total": page.total, "lines": [
            {**vars(line), "label": labels.get(line.feature, ""), **figure_columns(figures.get(line.feature))}
            for line in page.lines]})

    def around(self, request: Request) -> Response:
        """A feature's place in a list, and its neighbours there."""
        shown, number = self._shown(request), int(request.path_params["feature"])
        order = parse_query(request.query_params).listing().order(shown)
        at = np.flatnonzero(order == number)
        if not len(at):
            return _json({"place": None, "total": len(order), "previous": None, "next": None})
        place = int(at[0])
        return _json({"place": place, "total": len(order), "previous": int(order[place - 1]) if place else None,
                      "next": int(order[place + 1]) if place + 1 < len(order) else None})

    def random(self, request: Request) -> Response:
        """A feature of a list; `draw` decides which."""
        draw = request.path_params["draw"]
        order = parse_query(request.query_params).listing().order(self._shown(request))
        chosen = int(generator(int(draw), "a feature to look at").choice(order)) if len(order) else None
        return _json({"feature": chosen})

    def unlabelled(self, request: Request) -> Response:
        """The next feature of a list, after the given one, that nobody has labelled."""
        shown, number = self._shown(request), int(request.path_params["feature"])
        order = parse_query(request.query_params).listing().order(shown)
        at = np.flatnonzero(order == number)
        turned = np.roll(order, -int(at[0]) - 1) if len(at) else order
        left = turned[~np.isin(turned, list(shown.label_texts()))]
        return _json({"feature": int(left[0]) if len(left) else None})

    def feature(self, request: Request) -> Response:
        shown, number = self._shown(request), int(request.path_params["feature"])
        payload = feature_payload(shown.index, number, shown.label_texts())
        newest = shown.labels.newest(number)
        proposed = [] if shown.proposals is None else shown.proposals.of(number)
        return _json({**payload, "entry": newest and asdict(newest), "proposals": [asdict(one) for one in proposed]})

    def window(self, request: Request) -> Response:
        shown, numbers = self._shown(request), request.path_params
        example = shown.index.example(numbers["feature"], numbers["place"])
        before, after = min(numbers["before"], WIDEST), min(numbers["after"], WIDEST)
        return _json(window_payload(shown.index, example, before, after))

    def history(self, request: Request) -> Response:
        entries = self._shown(request).labels.history(request.path_params["feature"])
        return _json({"entries": [asdict(entry) for entry in entries]})

    def export_labels(self, request: Request) -> Response:
        shown = self._shown(request)
        return Response("".join(shown.labels.export()), media_type="application/x-ndjson", headers={
            "content-disposition": f'attachment; filename="labels-{shown.slug}.jsonl"'})

    def write_label(self, request: Request, body: bytes) -> Response:
        wanted = parse_body(LabelBody, body)
        entry = self._shown(request).labels.write(request.path_params["feature"], wanted.label, wanted.note,
                                                  wanted.author)
        return _json({"entry": asdict(entry)})

    def judge(self, request: Request, body: bytes) -> Response:
        """Accept or reject a proposed label."""
        proposals = self._shown(request).proposals
        if proposals is None:
            raise UserError("this index has no proposed labels; `olmoscope label` makes them")
        judged = proposals.judge(request.path_params["proposal"], parse_body(VerdictBody, body).verdict)
        return _json({"proposals": [asdict(one) for one in proposals.of(judged.feature)]})

    def import_labels(self, request: Request, body: bytes) -> Response:
        lines = parse_body(ImportBody, body).lines.split("\n")
        return _json({"new": self._shown(request).labels.import_lines(lines)})

    def wake(self, request: Request, body: bytes) -> Response:
        """Load what prompts and steering need, while the user writes the prompt."""
        shown = self._shown(request)
        shown.live.load()
        shown.sae()
        return _json({"model": shown.live.name})

    def prompt(self, request: Request, body: bytes) -> Response:
        """For each token of a text, its active features, strongest first."""
        shown = self._shown(request)
        ids = shown.live.tokens(parse_body(PromptBody, body).text, begin=shown.begin)
        codes = shown.live.encode(shown.sae(), shown.index.info.sae.site, ids)
        active = [[[latent, value] for latent, value in zip(latents, values, strict=True) if value > 0]
                  for latents, values in zip(codes.indices.tolist(), codes.values.tolist(), strict=True)]
        named = {latent for token in active for latent, _ in token}
        labels = shown.label_texts()
        return _json({"tokens": [{"id": number, "text": shown.index.tokens.text(number)} for number in ids],
                      "active": active, "density": {number: shown.densities[number].item() for number in sorted(named)},
                      "labels": {number: labels[number] for number in sorted(named & labels.keys())}})

    async def steer(self, request: Request) -> Response:
        """A text continued twice, without and with steering: one JSON object per line, as tokens come."""
        shown = self._shown(request)
        wanted = parse_body(SteerBody, await request.body())
        lines = await to_thread.run_sync(_continuations, shown, wanted)
        return StreamingResponse(_unless_gone(request, lines), media_type="application/x-ndjson")


def _continuations(shown: Shown, wanted: SteerBody) -> Iterator[str]:
    """Both texts, a token of each in turn.

    Raises:
        UserError: immediately, before the first line.
    """
    edits = []
    for edit in wanted.edits:
        if edit.feature >= shown.index.info.sae.d_sae:
            raise UserError(f"there is no feature {edit.feature}: the SAE has features 0 to "
                            f"{shown.index.info.sae.d_sae - 1}")
        unit = shown.index.feature(edit.feature).mean
        if unit == 0:
            raise UserError(f"feature {edit.feature} never fired on the indexed text, so it has no typical activation, "
                            "the unit of strength; choose another")
        edits.append(Edit(edit.feature, edit.mode, edit.strength * unit))
    ids = shown.live.tokens(wanted.text, room=wanted.tokens, begin=shown.begin)
    sae, site = shown.sae(), shown.index.info.sae.site
    going = {side: shown.live.continuation(sae, site, ids, chosen, temperature=wanted.temperature, seed=wanted.seed)
             for side, chosen in (("plain", []), ("steered", edits))}

    def lines() -> Iterator[str]:
        yield json.dumps({"edits": [vars(edit) for edit in edits]}) + "\n"
        for _ in range(wanted.tokens):
            for side in list(going):
                text, ended = going[side].step()
                if ended:
                    del going[side]
                yield json.dumps({"side": side, "text": text, "ended": ended}) + "\n"
        yield json.dumps({"done": True}) + "\n"

    return lines()


async def _unless_gone(request: Request, lines: Iterator[str]) -> AsyncIterator[str]:
    """Lines for as long as somebody listens: if the page stops, the model stops."""
    while not await request.is_disconnected():
        line = await to_thread.run_sync(next, lines, None)
        if line is None:
            return
        yield line


def build_app(collection: dict[str, Shown], port: int) -> Starlette:
    """The server for some indexes, for requests that name this machine and this port."""
    api, files = _Api(collection), PageFiles().answer
    routes = [
        Route("/api/saes", api.saes),
        Route("/api/{sae}/about", api.about),
        Route(f"/api/{{sae}}/{REPORT}", api.report),
        Route(f"/api/{{sae}}/{CARD}", api.card),
        Route("/api/{sae}/features", api.features),
        Route("/api/{sae}/around/{feature:int}", api.around),
        Route("/api/{sae}/random/{draw:int}", api.random),
        Route("/api/{sae}/unlabelled/{feature:int}", api.unlabelled),
        Route("/api/{sae}/feature/{feature:int}", api.feature),
        Route("/api/{sae}/window/{feature:int}/{place:int}/{before:int}/{after:int}", api.window),
        Route("/api/{sae}/label/{feature:int}", api.history, methods=["GET"]),
        Route("/api/{sae}/label/{feature:int}", _writing(api.write_label), methods=["PUT"]),
        Route("/api/{sae}/proposal/{proposal:int}", _writing(api.judge), methods=["PUT"]),
        Route("/api/{sae}/labels.jsonl", api.export_labels, methods=["GET"]),
        Route("/api/{sae}/labels.jsonl", _writing(api.import_labels), methods=["POST"]),
        Route("/api/{sae}/wake", _writing(api.wake), methods=["POST"]),
        Route("/api/{sae}/prompt", _writing(api.prompt), methods=["POST"]),
        Route("/api/{sae}/steer", api.steer, methods=["POST"]),
        Route("/", files),
        Route("/{name}", files),
    ]
    return Starlette(routes=routes, middleware=[Middleware(OnlyThisMachine, port=port)],
                     exception_handlers={UserError: _user_error, IndexError: _no_feature})


def _writing(answer: Callable[[Request, bytes], Response]) -> Callable[[Request], Any]:
    """An endpoint that reads the request's body, and then answers in a worker thread."""
    async def endpoint(request: Request) -> Response:
        return await to_thread.run_sync(answer, request, await request.body())
    return endpoint


def _json(value: Any) -> Response:
    return Response(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")),
                    media_type="application/json")


def _user_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


def _no_feature(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=404)

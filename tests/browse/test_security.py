"""Who may send requests to the page's server."""

import pytest

from browse_server import ask

SAE = "layer_01-width_512-topk_8_raw"
LABEL = f"/api/{SAE}/label/3"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1.evil.example:{port}", "evil.example:{port}",
                                  "localhost:1", "127.0.0.1:{port}@evil.example", "0.0.0.0:{port}", ""])
def test_other_names_are_refused(port: int, host: str) -> None:
    for method, path in (("GET", "/"), ("GET", "/api/saes"), ("PUT", LABEL)):
        status, text, _ = ask(port, method, path, host=host.format(port=port) or " ",
                              body={"label": "x"} if method == "PUT" else None)
        assert status in (400, 421), "uvicorn answers 400 to what is no host at all"
        assert "saes" not in str(text)


@pytest.mark.parametrize("host", ["localhost:{port}", "127.0.0.1:{port}", "LOCALHOST:{port}"])
def test_its_own_names_are_answered(port: int, host: str) -> None:
    assert ask(port, "GET", "/api/saes", host=host.format(port=port))[0] == 200


@pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"},
                                     {"Origin": "http://localhost:{port}"}, {"Sec-Fetch-Site": "cross-site"},
                                     {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "none"}])
def test_other_origins_change_nothing(port: int, headers: dict[str, str]) -> None:
    sent = {name: value.format(port=port) for name, value in headers.items()}
    for method, path, body in (("PUT", LABEL, {"label": "stolen"}), ("POST", f"/api/{SAE}/labels.jsonl", {"lines": ""}),
                               ("POST", f"/api/{SAE}/prompt", {"text": "x"}),
                               ("POST", f"/api/{SAE}/steer", {"text": "x", "edits": []})):
        assert ask(port, method, path, body, sent)[0] == 403
    assert ask(port, "GET", LABEL)[1] == {"entries": []}


def test_forms_cannot_write(port: int) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert ask(port, "PUT", LABEL, {"label": "x"}, {"Content-Type": kind})[0] == 415
    assert ask(port, "GET", LABEL)[1] == {"entries": []}


def test_its_own_page_may_write(port: int) -> None:
    headers = {"Origin": f"http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}
    assert ask(port, "PUT", f"/api/{SAE}/label/4", {"label": "mine"}, headers)[0] == 200


def test_every_answer_carries_the_policy(port: int) -> None:
    for path in ("/", "/main.js", "/api/saes", "/nothing", f"/api/{SAE}/feature/99999", "/api/nothing/about"):
        for host in (None, "evil.example"):
            headers = ask(port, "GET", path, host=host)[2]
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("path", ["/../labels.sqlite", "/%2e%2e/app.py", "/..%2f..%2fcli.py", "//etc/passwd", "/%00",
                                  "/main.js%00"])
def test_only_the_pages_own_files_are_served(port: int, path: str) -> None:
    assert ask(port, "GET", path)[0] in (404, 400)


def test_what_is_not_there_or_wrong_is_said_in_a_line(port: int) -> None:
    status, answer, _ = ask(port, "GET", f"/api/{SAE}/feature/512")
    assert status == 404 and "512" in answer["error"]
    status, answer, _ = ask(port, "GET", "/api/no-such/about")
    assert status == 400 and SAE in answer["error"]
    for query in ("sort=evil", "limit=0", "limit=501", "offset=-1", "unknown=1", "min_density=x", "dead=perhaps"):
        status, answer, _ = ask(port, "GET", f"/api/{SAE}/features?{query}")
        assert status == 400 and query.split("=")[0] in answer["error"], query
    for body in ({}, {"label": 3}, {"label": "x", "extra": 1}, [], "x"):
        status, answer, _ = ask(port, "PUT", LABEL, body)
        assert status == 400 and answer["error"].startswith("the request is wrong"), body
    assert ask(port, "POST", f"/api/{SAE}/prompt", {"text": ""})[1] == {"error": "the prompt is empty: write some text"}

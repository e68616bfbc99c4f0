"""What the hub refuses, lacks or never finishes gets one line with the true cause; only network failures blame it.

Cases of one environment share a process, except those that wait: if no answer comes, huggingface_hub tries again for
half a minute. Those run side by side in separate processes, since threads would close each other's connections.
"""

import json

import pytest

from commands import LIBRARIES, shared_commands
from helpers import save_small_model
from hub_endpoint import COMMIT, HubEndpoint, Trouble
from olmoscope.model_errors import POINTER
from olmoscope.release.build import build_release
from release_runs import RAW, make_out, recipe_for_tests

LFS = POINTER + b"v1\noid sha256:" + b"4" * 64 + b"\nsize 14000000000\n"

CODE = """
import json, sys, time, torch
from olmoscope.errors import UserError
from olmoscope.sae.io.open import open_sae
from olmoscope.model.load import load_model
from olmoscope.recipe.schema import Model
from olmoscope.site import Site
from olmoscope.text.hub_files import fetch, matching
from olmoscope.tokens.tokenizer import load_tokenizer

# The hub's library tries as often as it does for users, but waits less: up to 8 s between two tries, 2 minutes in all.
wait, time.sleep = time.sleep, lambda seconds: wait(min(seconds, 0.05))

ASK = {"model": lambda name, revision: load_model(Model(name=name, revision=revision, dtype="float32"),
                                                  [Site(1)], torch.device("cpu")),
       "tokenizer": lambda name, revision: load_tokenizer(Model(name=name, revision=revision)),
       "sae": lambda name, revision: open_sae(name),
       "file": lambda name, revision: fetch(f"hf://datasets/{name}"),
       "files": lambda name, revision: matching(name, revision, "*")}

def tell(asked):
    found = []
    for what, name, revision in asked:
        try:
            ASK[what](name, revision)
            found.append("loaded")
        except UserError as error:
            found.append(str(error))
    return found

print(json.dumps({case: tell(asked) for case, asked in json.loads(sys.argv[1]).items()}))
"""

ALL = [("model", "some/model", None), ("tokenizer", "some/model", None), ("sae", f"some/saes:{RAW}", None),
       ("file", "some/texts/one.txt", None)]
"""One of each kind."""

ANSWERS = {
    "well": [*ALL, ("files", "some/texts", None)],
    "missing": [("model", "no/model", None), ("tokenizer", "no/model", None), ("sae", "no/saes:x", None),
                ("file", "no/texts/x", None), ("files", "no/texts", None)],
    "revision": [("model", "some/model", "v9"), ("sae", f"some/saes@v9:{RAW}", None), ("files", "some/texts", "v9")],
    "entry": [("model", "some/no-config", None), ("model", "some/adapter", None), ("sae", "some/saes:no/such", None),
              ("file", "some/texts/two.txt", None)],
    "gated": [("model", "some/gated", None), ("tokenizer", "some/gated", None),
              ("sae", f"some/gated-saes:{RAW}", None), ("file", "some/gated-texts/one.txt", None)],
    "closed": [("model", "some/disabled", None), ("model", "some/private", None)],
    "bare": [("model", "some/bare", None), ("tokenizer", "some/bare", None)],
    "damaged": [("model", "some/pointer", None), ("tokenizer", "some/pointer", None), ("sae", "some/pointer", None)],
}
WAITS = {"status": [("model", "some/busy", None)], "cut": [("model", "some/cut", None)],
         "cut once": [("model", "some/cut-once", None)]}
PARTIAL = {"no answer (weights)": [("model", "some/partial", None)],
           "no answer (tokenizer)": [("tokenizer", "some/partial", None)]}
DEAD = {"no answer (weights)": PARTIAL["no answer (weights)"], "no answer": ALL[:1], "no answer (SAE)": ALL[2:3],
        "no answer (file)": ALL[3:]}

PROCESSES = [
    ({}, ANSWERS), *(({}, {case: asked}) for case, asked in WAITS.items()),
    *(({"HF_ENDPOINT": "http://127.0.0.1:9"}, {case: asked}) for case, asked in DEAD.items()),
    ({"HF_TOKEN": "hf_abc"}, {"gated, logged in": [("model", "some/gated", None)]}),
    ({"HF_HUB_OFFLINE": "1"}, {
        "offline": [*ALL, ("files", "some/texts", None)],
        "offline, config there": [each for asked in PARTIAL.values() for each in asked]}),
    ({"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}, {"slow": [("model", "some/slow", None)]}),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each process said."""
    root = tmp_path_factory.mktemp("hub")
    model = save_small_model("Llama", root / "model")
    out = make_out(root / "out", recipe_for_tests("[{layer: 3, d_sae: 96, k: 4}]"))
    build_release(out)
    (root / "texts").mkdir()
    (root / "texts" / "one.txt").write_text("one")
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    (root / "pointer").mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (root / "pointer" / name).write_bytes((model / name).read_bytes())
    (root / "pointer" / "cfg.json").write_bytes((out / "release" / RAW / "cfg.json").read_bytes())
    for name in ("model.safetensors", "tokenizer.json", "sae_weights.safetensors"):
        (root / "pointer" / name).write_bytes(LFS)
    for number in range(len(PROCESSES)):  # caches that have its config, as after `olmoscope plan`
        cache = root / f"hf-{number}" / "hub" / "models--some--partial"
        for path, content in ((f"snapshots/{COMMIT}/config.json", (model / "config.json").read_text()),
                              ("refs/main", COMMIT)):
            (cache / path).parent.mkdir(parents=True)
            (cache / path).write_text(content)
    (root / "bare").mkdir()
    (root / "bare" / "config.json").write_bytes((model / "config.json").read_bytes())
    with HubEndpoint() as hub:
        hub.add("model", "some/bare", root / "bare")
        for name in ("model", "gated", "disabled", "private", "busy", "slow", "cut", "cut-once"):
            hub.add("model", f"some/{name}", model)
        for name in ("saes", "gated-saes"):
            hub.add("model", f"some/{name}", out / "release")
        for name in ("texts", "gated-texts"):
            hub.add("dataset", f"some/{name}", root / "texts")
        for name in ("adapter", "pointer"):
            hub.add("model", f"some/{name}", root / name)
        hub.add("model", "some/no-config", root / "texts")
        for name in ("gated", "gated-saes", "disabled", "private"):
            hub.close("model", f"some/{name}", name.partition("-")[0])
        hub.close("dataset", "some/gated-texts", "gated")
        hub.troubles += [Trouble("some/busy/", status=503), Trouble("some/slow/", seconds=3),
                         Trouble("elsewhere/models/some/cut/", after=0),
                         Trouble("elsewhere/models/some/cut-once/", after=1000, times=2)]
        commands = shared_commands(LIBRARIES)
        running = [commands.start_as(
            hub.environment(root / f"hf-{number}") | environment | {"XDG_CACHE_HOME": str(root / f"cache-{number}")},
            json.dumps(cases), code=CODE) for number, (environment, cases) in enumerate(PROCESSES)]
        ended = [commands.wait(pid, 300) for pid, _, _ in running]
    found = {}
    for status, (_, output, errors) in zip(ended, running, strict=True):
        assert status == 0, errors.read_text()
        found |= json.loads(output.read_text().splitlines()[-1])
    return found


MISSING = "the hub has no such {}, or it is private: check the name, or log in with `hf auth login`"
GATED = "it is gated: accept its licence at https://huggingface.co/{} and log in with `hf auth login`"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "messages"), [
    ("well", ["loaded"] * 5),
    ("missing", [f"cannot load model 'no/model': {MISSING.format('model')}; nor is there a folder no/model in ",
                 f"cannot load model 'no/model': {MISSING.format('model')}",
                 f"cannot get x from hub repository no/saes: {MISSING.format('model')}",
                 f"hf://datasets/no/texts/x: {MISSING.format('dataset')}",
                 f"hf://datasets/no/texts: {MISSING.format('dataset')}"]),
    ("revision", ["cannot load model 'some/model': some/model has no revision 'v9': see https://huggingface.co/some/model",
                  f"cannot get {RAW} from hub repository some/saes: some/saes has no revision 'v9'",
                  "hf://datasets/some/texts@v9: some/texts has no revision 'v9': see https://huggingface.co/datasets/"]),
    ("entry", ["cannot load model 'some/no-config': some/no-config has no config.json",
               "cannot load model 'some/adapter': some/adapter has no file adapter_model.safetensors",
               "cannot get no/such from hub repository some/saes: it has no such file or folder",
               "hf://datasets/some/texts/two.txt: some/texts has no file two.txt"]),
    ("gated", [f"cannot load model 'some/gated': {GATED.format('some/gated')}"] * 2 + [
        f"cannot get {RAW}/cfg.json from hub repository some/gated-saes: {GATED.format('some/gated-saes')}",
        f"hf://datasets/some/gated-texts/one.txt: {GATED.format('datasets/some/gated-texts')}"]),
    ("gated, logged in", ["cannot load model 'some/gated': it is gated: accept its licence at https://huggingface.co/"
                          "some/gated; the account that is logged in here has no access"]),
    ("closed", ["cannot load model 'some/disabled': the hub has closed some/disabled",
                f"cannot load model 'some/private': {MISSING.format('model')}"]),
    ("bare", ["cannot load model 'some/bare': ", "cannot load the tokenizer of model 'some/bare': "]),
    ("damaged", ["cannot load model 'some/pointer': ", "cannot load the tokenizer of model 'some/pointer': ", ""]),
    ("offline", ["cannot load model 'some/model': it is not in the hub's cache (",
                 "cannot load model 'some/model': it is not in the hub's cache (",
                 f"cannot get {RAW} from hub repository some/saes: it is not in the hub's cache (",
                 "hf://datasets/some/texts/one.txt: it is not in", "hf://datasets/some/texts: it is not in"]),
    ("offline, config there", ["cannot load model 'some/partial': it is not in the hub's cache (",
                               "cannot load the tokenizer of model 'some/partial': it is not in the hub's cache ("]),
    ("status", ["cannot load model 'some/busy': the hub answers with an error (status 503): try again later"]),
    ("cut once", ["loaded"]),
])
def test_what_is_not_the_network(told, case, messages):
    assert len(told[case]) == len(messages)
    for text, message in zip(told[case], messages, strict=True):
        assert text.startswith(message), text
        assert "network" not in text and "connection" not in text and "\n" not in text
        if case == "damaged":
            assert "is a git-LFS pointer" in text
        if case == "bare":
            assert "has no weights as safetensors" in text or "has no tokenizer (tokenizer.json)" in text
        if "offline" in case:
            assert "HF_HUB_OFFLINE forbids asking the hub" in text


@pytest.mark.slow
@pytest.mark.parametrize("case", ["no answer", "no answer (SAE)", "no answer (file)", "no answer (weights)",
                                  "slow", "cut"])
def test_what_is_the_network(told, case):
    (text,) = told[case]
    assert ": no network: http://127.0.0.1:" in text and "check the connection" in text and "\n" not in text, text

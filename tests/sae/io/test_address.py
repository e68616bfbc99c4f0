"""One kind of address for the hub, SAELens' registry and folders; inspected before anything large is downloaded."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import foreign_files as made
from hub_endpoint import HubEndpoint, Trouble
from olmoscope.errors import UserError
from olmoscope.sae.io import circuit_tracer, coverage, gemma_scope, gemma_scope_2, goodfire, qwen_scope
from olmoscope.sae.io.open import find_saes, open_sae
from olmoscope.sae.io.registry import FILE, entries, read_release, registered, releases
from olmoscope.sae.io.site_names import of_module

FOREIGN = Path(__file__).parents[2] / "foreign"

CODE = """
import json, sys
from pathlib import Path
from huggingface_hub import constants
from olmoscope.errors import UserError
from olmoscope.sae.io.open import look_at, open_sae

def fetched():
    return sorted(path.name for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_symlink())

found = {}
for address in sys.argv[1:]:
    try:
        place, reading = look_at(address)
        sizes = [place.size(name) for name in reading.files]
        seen = fetched()
        opened = open_sae(address)
        found[address] = [reading.format, str(reading.writes[0]), seen, opened.kind, opened.name, sizes[0] > 0,
                          float(opened.sae.W_dec.sum()), opened.model_name, reading.scale]
    except UserError as error:
        found[address] = str(error)
print(json.dumps(found))
"""

GEMMA, R1 = "saelens:gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "saelens:llama_scope_r1_distill/"
QWEN, SET, SPARSE = "Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_20", "mwhanna/qwen3-4b-transcoders", "someone/sparse"
CROSS = "saelens:mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_1"
GATED = "layer_20/width_16k/average_l0_71"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The output of a process for some addresses, in this order, with a hub of its own."""
    root = tmp_path_factory.mktemp("hub")
    made.gemma_scope(root)
    made.qwen_scope(root)
    r1 = registered(R1 + read_release("llama_scope_r1_distill")["saes"][0]["id"])
    made.llama_scope_r1(root, path=r1.path)
    made.clt(root)
    for layer in (2, 10):
        made.circuit_tracer(root, path=f"layer_{layer}.safetensors")
    shutil.copytree(FOREIGN / "sparsify/topk", root / SPARSE)
    (root / SPARSE / "layers.3/expected.safetensors").unlink()
    addresses = [GEMMA, f"{QWEN}:layer9.sae.pt", QWEN, f"{SET}@main:layer_2.safetensors", SET, f"{SPARSE}:layers.3",
                 R1 + r1.id, f"{r1.repo}:{r1.path}", CROSS, f"{SET}:layer_3.safetensors", "no/such:x",
                 f"some/gated:{GATED}", f"some/busy:{GATED}"]
    with HubEndpoint() as hub:
        for repo in {GEMMA: "google/gemma-scope-2b-pt-res", QWEN: QWEN, SET: SET, SPARSE: SPARSE, R1: r1.repo,
                     CROSS: "mntss/clt-gemma-2-2b-2.5M"}.values():
            hub.add("model", repo, root / repo)
        for repo in ("some/gated", "some/busy"):
            hub.add("model", repo, root / "google/gemma-scope-2b-pt-res")
        hub.close("model", "some/gated", "gated")
        hub.troubles.append(Trouble("some/busy/resolve", status=403))
        done = subprocess.run([sys.executable, "-c", CODE, *addresses], capture_output=True, text=True, timeout=240,
                              env=hub.environment(root / "hf"))
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]).values()), root, r1


def test_an_entry_of_the_registry(told):
    (gemma, *_), root, _ = told
    local = open_sae(root / "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")
    assert gemma == ["a Gemma Scope SAE", "layers.20", [], "hub", GEMMA, True, float(local.sae.W_dec.sum()),
                     "google/gemma-2-2b", 1.0]


def test_weights_are_fetched_only_to_be_loaded(told):
    """Inspecting a torch or safetensors file downloads only its header; settings are downloaded whole."""
    (_, qwen, alone, layer, *_), _, _ = told
    assert qwen[0] == "a Qwen-Scope SAE" and "layer9.sae.pt" not in qwen[2]
    assert alone[0] == "a Qwen-Scope SAE"  # the only file there
    assert layer[:2] == ["a transcoder of a circuit-tracer set", "layers.2.mlp.out"]
    assert "config.yaml" in layer[2] and "layer_2.safetensors" not in layer[2]


def test_a_set_is_told_from_an_sae(told):
    answers, _, _ = told
    assert answers[4] == (f"{SET} holds 2 SAEs; give the address of one of them: {SET}:layer_2.safetensors, "
                          f"{SET}:layer_10.safetensors")
    assert answers[9].startswith(f"cannot get layer_3.safetensors from hub repository {SET}: it has no such file or "
                                 "folder; did you mean layer_2.safetensors")
    assert answers[10].startswith("cannot get x from hub repository no/such: the hub has no such model")


def test_what_the_hub_refuses_while_it_is_looked_into(told):
    """The message gives the hub's reason, and does not say that the file is damaged."""
    answers, _, _ = told
    assert answers[11].startswith(f"cannot get {GATED}/params.npz from hub repository some/gated: it is gated: accept")
    assert answers[12].startswith(f"cannot get {GATED}/params.npz from hub repository some/busy: the hub refuses "
                                  "access (status 403)")


def test_the_run_beside_a_folder_is_read(told):
    answers, _, _ = told
    assert answers[5][:2] == ["a sparsify SAE", "layers.3"] and answers[5][7] == "some/model"


def test_what_the_registry_alone_says(told):
    answers, _, r1 = told
    assert answers[6][8] == r1.scale and answers[6][7] == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert "open it as saelens:llama_scope_r1_distill/ID" in answers[7]


def test_a_layer_of_a_cross_layer_transcoder_by_its_number(told):
    answers, _, _ = told
    assert answers[8][:2] == ["a layer of a cross-layer transcoder", "layers.1.mlp.out"]


@pytest.mark.parametrize(("address", "message"), [
    ("saelens:gemma-scope-2b-pt-rs/x", "has no release 'gemma-scope-2b-pt-rs'; did you mean gemma-scope-2b-pt-res"),
    ("saelens:gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_72",
     "has 316 dictionaries, but none is called .*; did you mean .*layer_20/width_16k/average_l0_71"),
    ("saelens:zzz", "has no release 'zzz'; its [0-9]+ releases are listed in "),
    ("saelens:gpt2-small-res-jb/9999", r"has 13 dictionaries, but none is called '9999' \(they are called blocks"),
])
def test_what_the_registry_does_not_have(address, message):
    with pytest.raises(UserError, match=message) as refusal:
        open_sae(address)
    assert "\n" not in str(refusal.value)


def test_without_saelens(monkeypatch):
    from olmoscope.sae.io import registry

    registry.releases.cache_clear()
    monkeypatch.setattr(registry, "FILE", "sae_lens/no_such_file.yaml")
    with pytest.raises(UserError, match=r"pip install olmoscope\[saelens\], or give the SAE's address on the hub"):
        registered("saelens:gemma-scope-2b-pt-res/x")


@pytest.fixture(scope="module")
def registry():
    return list(entries())


def test_most_of_the_registry_is_in_a_format_that_is_read(registry, monkeypatch):
    monkeypatch.setattr(coverage, "entries", lambda: registry)
    found = coverage.coverage()
    assert sum(one.dictionaries for one in found) == len(registry) > 13_000
    assert [one.loader for one in found if one.format is None] == ["temporal"]
    assert sum(one.dictionaries for one in found if one.format) / len(registry) > 0.999


class Words:
    """A place with a known path and nothing else."""

    def __init__(self, entry):
        self.words = f"{entry.repo}/{entry.path}"


def test_what_names_alone_say(registry):
    """Releases without settings state layer, place and model in the path; this covers every registered one."""
    told = {"gemma_2": lambda words: gemma_scope._REPOSITORY.search(words) and gemma_scope._PLACE.search(words),
            "gemma_3": lambda words: gemma_scope_2._LAYER.search(words) and gemma_scope_2._REPOSITORY.search(words),
            "qwen_scope": lambda words: qwen_scope._REPOSITORY.search(words) and qwen_scope._LAYER.search(words),
            "goodfire": goodfire._LAYER.search, "deepseek_r1": goodfire._LAYER.search,
            "mwhanna_transcoder": circuit_tracer._QWEN.search}
    told["gemma_2_transcoder"] = told["gemma_2"]
    seen = set()
    for entry in registry:
        if entry.loader in told:
            words = Words(entry).words
            assert told[entry.loader](words), words
            seen.add(entry.loader)
            if entry.loader == "gemma_3":
                assert of_module(gemma_scope_2._places(Words(entry), {})[0]) is not None, words
    assert seen == set(told)


def test_a_release_at_a_time_is_the_whole_registry(registry):
    """The text is cut into releases; each of them alone gives the same entries as the whole."""
    text = importlib.metadata.distribution("sae-lens").locate_file(FILE).read_text()
    assert len(releases()) == len({entry.release for entry in registry}) == text.count("\n  repo_id: ")
    for entry in registry[::1500]:
        assert registered(f"saelens:{entry.release}/{entry.id}") == entry
    gemma = registered("saelens:gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")
    assert (gemma.repo, gemma.path, gemma.l0) == ("google/gemma-scope-2b-pt-res",
                                                  "layer_20/width_16k/average_l0_71", 71)
    scope = registered("saelens:llama_scope_lxr_8x/l0r_8x")
    assert (scope.loader, scope.scale, scope.model) == ("llama_scope", 58.935251798561154, "meta-llama/Llama-3.1-8B")


def test_a_folder_of_many_stands_for_all(tmp_path):
    for layer in (10, 9):
        made.circuit_tracer(tmp_path, path=f"layer_{layer}.safetensors")
    assert find_saes(str(tmp_path / SET)) == [str(tmp_path / SET / f"layer_{layer}.safetensors") for layer in (9, 10)]
    assert find_saes(str(FOREIGN / "dictionary_learning"))[0].endswith("AutoEncoder/trainer_0")
    assert len(find_saes(str(FOREIGN / "sparsify"))) == 5


def test_a_set_whose_transcoders_are_elsewhere(tmp_path):
    """circuit-tracer's config.yaml may list them."""
    (tmp_path / "config.yaml").write_text(
        "transcoders:\n- hf://google/gemma-scope-2b-pt-transcoders//layer_0/width_16k/average_l0_76/params.npz\n"
        "- hf://someone/set/layer_1.safetensors@v2\n- layer_2.safetensors\n")
    assert find_saes(str(tmp_path)) == [
        "google/gemma-scope-2b-pt-transcoders:layer_0/width_16k/average_l0_76/params.npz",
        "someone/set@v2:layer_1.safetensors", str(tmp_path / "layer_2.safetensors")]
    (tmp_path / "config.yaml").write_text("transcoders: ['hf://someone']\n")
    with pytest.raises(UserError, match="transcoders: 'hf://someone' is not an address"):
        find_saes(str(tmp_path))

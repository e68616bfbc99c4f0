"""Models of many families are read correctly or refused as intended: benchmarks/architectures.py on some of them.

The script runs once over HERE, two families at a time, and the tests read its findings. The script itself tries all of
transformers' causal LMs (docs/models.md is its table); NOT_HERE says why these tests leave out the others.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from small_model_sizes import LEFT_OUT

REPOSITORY = Path(__file__).parents[2]
SECONDS = 900
"""Seconds for the script on a busy machine; it takes two minutes on two idle cores."""


def names(text):
    return text.split()


RIGHT = names("""apertus axk1 bitnet codegen cohere cohere2_moe ctrl cwm dbrx deepseek_v3 diffllama doge ernie4_5_moe
    exaone4 fuyu gemma2 gemma3 gemma3_text gemma4_text glm4 glm4_moe_lite gpt2 gpt_bigcode gpt_neo gpt_neox gptj
    granitemoeshared helium hunyuan_v1_dense jetmoe llama llama4_text minicpm3 mistral mixtral moshi nanochat olmo olmo3
    olmoe persimmon phi phi3 qwen2 qwen3_moe stablelm""")
"""Families for which every command must be right."""
NOT_APART = names("""afmoe bamba bart bert biogpt bloom falcon falcon_h1 gpt_oss jamba kimi_linear mamba mpt openai-gpt
    opt recurrent_gemma xglm""")
"""Families for which only `documents: apart` is refused: they see earlier documents, whatever the position ids."""
REFUSED = {"cpmant": "decoder layer", "gemma3n_text": "decoder layer", "hrm_text": "decoder layers",
           "hy_v4": "decoder layer", "longcat_flash": "decoder layers", "xlm": "decoder layers"}
"""Families for which every command is refused, in one line."""
HERE = [*RIGHT, *NOT_APART, *REFUSED]

NOT_HERE = {
    "attention and MLP as in a family that is here": names("""arcee aria_text beam cohere2 cohere_compass_text
        ernie4_5 gemma glm gpt_neox_japanese granite granite_swa hyperclovax internlm3 iquestcoder jais2 mellum
        ministral ministral3 modernbert-decoder nemotron olmo2 qwen3 seed_oss smollm3 starcoder2 vaultgemma"""),
    "experts as in a family that is here": names("""deepseek_v2 dots1 exaone_moe flex_olmo flint glm4_moe granitemoe
        granitemoe_swa hunyuan_v1_moe hy_v3 kolibri1 laguna minimax_m2 mimo_v2_flash phimoe qwen2_moe solar_open youtu
        zaya"""),
    "recurrent or linear layers beside attention, as in a family that is here": names("""bailing_hybrid falcon_mamba
        granitemoehybrid lfm2 lfm2_moe lfm3 mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe
        qwen3_5_moe_text qwen3_5_text qwen3_next rwkv xlstm zamba zamba2"""),
    "a wrapper of a text model that is here, or the text model of such a wrapper": names("""gemma4 gemma4_unified
        gemma4_unified_text git got_ocr2 llama4 minimax_m3_vl_text moss_transcribe_diarize phi4_multimodal"""),
    "an encoder with a causal mask, or the decoder of an encoder-decoder": names("""bert-generation big_bird
        bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra ernie marian mbart megatron-bert mvp
        pegasus plbart rembert roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm-roberta xlm-roberta-xl
        xmod"""),
    "takes longer than most": names("""axk2 deepseek_v32 dots3_note dots3_note_text glm_moe_dsa inkling2_text
        inkling_text"""),
    "refused, as others that are here": names("""blt deepseek_v4 prophetnet qwen4_exp qwen4_exp_text reformer xlnet"""),
}
"""Families that only the script tries, by the reason."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The script's findings, by family and command."""
    path = tmp_path_factory.mktemp("architectures") / "found.json"
    done = subprocess.run([sys.executable, REPOSITORY / "benchmarks" / "architectures.py", "--only", ",".join(HERE),
                           "--json", path], capture_output=True, text=True, timeout=SECONDS, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode in (0, 1), done.stderr  # 1: something is wrong, as the tests will say
    return json.loads(path.read_text())


def states(findings):
    return {command: finding["state"] for command, finding in findings.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", RIGHT)
def test_every_command_is_right(family, found):
    assert set(states(found[family]).values()) == {"right"}, found[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", NOT_APART)
def test_only_documents_apart_are_refused(family, found):
    assert states(found[family]) == {"collect": "right", "collect apart": "refused", "evaluate": "right",
                                     "index": "right"}, found[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_every_command_refuses_what_cannot_be_read(family, found):
    assert set(states(found[family]).values()) == {"refused"}, found[family]
    assert all(REFUSED[family] in finding["reason"] for finding in found[family].values())


@pytest.mark.slow
def test_every_family_is_here_or_not_for_a_reason():
    from small_models import families

    assert sorted([*HERE, *LEFT_OUT, *itertools.chain(*NOT_HERE.values())]) == families()


def test_the_page_of_models_is_that_of_this_transformers():
    """docs/models.md must be written again for a new transformers; it names every family once."""
    page = (REPOSITORY / "docs" / "models.md").read_text()
    assert "**wrong**" not in page
    version = re.search(r"transformers (\d+\.\d+\.\d+)", page)[1]
    if version != transformers.__version__:
        pytest.skip(f"docs/models.md is of transformers {version}, here is {transformers.__version__}")
    from small_models import families

    rows = re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)
    left_out = re.findall(r"^- `([\w-]+)`: ", page.split("## Not tried")[1], re.MULTILINE)
    assert rows + left_out == [*(family for family in families() if family not in LEFT_OUT), *LEFT_OUT]

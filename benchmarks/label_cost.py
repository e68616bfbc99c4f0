"""Tokens of prompts that a feature's label takes from an endpoint: the tests' own, which counts by a real tokenizer.

    python benchmarks/label_cost.py INDEX TOKENIZER.json [--most 60]

INDEX gets proposals and answers: give a copy. Each message counts 8 tokens more, as a chat template adds.
"""

import argparse
import json
import sys
import zlib
from pathlib import Path

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import chat_endpoint
from olmoscope.features.read import FeatureIndex
from olmoscope.labelling.model_run import Asking, ask_endpoint
from olmoscope.labelling.proposals import PROPOSALS_FILE, Proposals
from olmoscope.labelling.run import most_important
from olmoscope.labelling.text_blocks import TextBlocks

KINDS = {'"label"': "explain", "between << and >>? JSON": "fuzz", '"number"': "intruder", '"numbers"': "output"}
"""What only the prompts of a kind hold."""


def answer(prompt: str) -> str:
    """A rather long label (23 tokens of SmolLM2's), another one for each feature; or a chance."""
    if '"label"' in prompt:
        number = zlib.crc32(prompt.encode())
        return json.dumps({"label": f"words of code that are marked and follow a name, kind {number}"})
    return json.dumps({"percent": 50, "number": 1, "numbers": [1]})


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--most", type=int, default=60)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    chat_endpoint.tokenizer = lambda: tokenizer  # type: ignore[assignment]
    index = FeatureIndex(arguments.index)
    with chat_endpoint.ChatEndpoint(answer) as server:
        asked = ask_endpoint(TextBlocks(index), Asking(server.url, "m"), most_important(index, arguments.most),
                             Proposals(arguments.index / PROPOSALS_FILE, index.info.sae.d_sae))
        kinds = {"explain": 0, "detect": 0, "fuzz": 0, "intruder": 0, "output": 0}
        for prompt in server.prompts():
            kind = next((name for mark, name in KINDS.items() if mark in prompt), "detect")
            kinds[kind] += chat_endpoint.count(prompt) + chat_endpoint.OVERHEAD
    for kind, tokens in kinds.items():
        print(f"{kind}: {tokens / asked.run.labelled:.0f} tokens of prompts a feature ({asked.run.labelled} features)")


if __name__ == "__main__":
    main()

"""The columns of Neuronpedia's tables that an import may fill, with their types (`apps/webapp/prisma/schema.prisma`,
August 2026; foreign/read_neuronpedia.py compares them with the file itself), and a check of exported files by them.

A type is `String`, `Int`, `Float`, `Boolean` or another; `?` may be null, `[]` is a list, `!` has no default and is
required.
"""

import gzip
import json

_ID = {"creatorId": "String!", "createdAt": "DateTime"}
_UMAP = {"umap_x": "Float?", "umap_y": "Float?", "umap_cluster": "Int?", "umap_log_feature_sparsity": "Float?"}
_LISTS = ("neuron_alignment_{}", "correlated_neurons_{}", "correlated_features_{}")
TABLES = {
    "SourceRelease": _ID | {
        "name": "String!", "visibility": "Visibility", "isNewUi": "Boolean", "featured": "Boolean",
        "description": "String!", "descriptionShort": "String?", "urls": "String[]", "creatorEmail": "String?",
        "creatorName": "String!", "creatorNameShort": "String?", "defaultSourceSetName": "String?",
        "defaultSourceId": "String?", "defaultUmapSourceIds": "String[]"},
    "Model": _ID | {
        "id": "String!", "displayNameShort": "String", "displayName": "String", "tlensId": "String?",
        "openRouterId": "String?", "dimension": "Int?", "thinking": "Boolean", "visibility": "Visibility",
        "defaultSourceSetName": "String?", "defaultSourceId": "String?", "defaultGraphSourceSetName": "String?",
        "inferenceEnabled": "Boolean", "instruct": "Boolean", "layers": "Int!", "neuronsPerLayer": "Int!",
        "owner": "String!", "updatedAt": "DateTime", "website": "String?"},
    "SourceSet": _ID | {
        "modelId": "String!", "name": "String!", "hasDashboards": "Boolean", "allowInferenceSearch": "Boolean",
        "visibility": "Visibility", "description": "String!", "type": "String", "creatorName": "String!",
        "urls": "String[]", "creatorEmail": "String?", "releaseName": "String?", "hasGraphs": "Boolean",
        "graphEnabled": "Boolean", "similarityMatrixEnabled": "Boolean", "defaultOfModelId": "String?",
        "defaultGraphModelId": "String?", "defaultRange": "Int", "defaultShowBreaks": "Boolean", "showDfa": "Boolean",
        "showCorrelated": "Boolean", "showHeadAttribution": "Boolean", "showUmap": "Boolean"},
    "Source": _ID | {
        "id": "String!", "modelId": "String!", "hasDashboards": "Boolean", "inferenceEnabled": "Boolean",
        "saelensConfig": "Json?", "saelensRelease": "String?", "saelensSaeId": "String?", "hfRepoId": "String?",
        "hfFolderId": "String?", "visibility": "Visibility", "defaultOfModelId": "String?", "setName": "String!",
        "hasUmap": "Boolean", "hasUmapLogSparsity": "Boolean", "hasUmapClusters": "Boolean", "num_prompts": "Int?",
        "num_tokens_in_prompt": "Int?", "dataset": "String?", "notes": "String?", "cosSimMatchModelId": "String?",
        "cosSimMatchSourceId": "String?"},
    "Neuron": _UMAP | {
        "modelId": "String!", "layer": "String!", "index": "String!", "sourceSetName": "String?",
        "creatorId": "String?", "createdAt": "DateTime", "maxActApprox": "Float?", "hasVector": "Boolean",
        "vector": "Float[]", "vectorLabel": "String?", "vectorDefaultSteerStrength": "Float?", "hookName": "String?",
        "topkCosSimIndices": "Int[]", "topkCosSimValues": "Float[]", "neg_str": "String[]", "neg_values": "Float[]",
        "pos_str": "String[]", "pos_values": "Float[]", "frac_nonzero": "Float", "decoder_weights_dist": "Float[]",
        "neuron_alignment_values": "Float[]",
        **{name.format("indices"): "Int[]" for name in _LISTS}, **{name.format("l1"): "Float[]" for name in _LISTS},
        **{name.format("pearson"): "Float[]" for name in _LISTS[1:]},
        **{f"{name}_hist_data_bar_{what}": "Float[]" for name in ("freq", "logits") for what in ("heights", "values")}},
    "Activation": {
        "id": "String", "tokens": "String[]", "dataIndex": "String?", "index": "String!", "layer": "String!",
        "modelId": "String!", "dataSource": "String?", "maxValue": "Float!", "maxValueTokenIndex": "Int!",
        "minValue": "Float!", "values": "Float[]", "dfaValues": "Float[]", "dfaTargetIndex": "Int?",
        "dfaMaxValue": "Float?", "zQIndices": "Int[]", "zKIndices": "Int[]", "zValues": "Float[]",
        "lossValues": "Float[]", "logitContributions": "String?", "binMin": "Float?", "binMax": "Float?",
        "binContains": "Float?", "qualifyingTokenIndex": "Int?", **_ID},
    "Explanation": _UMAP | {
        "id": "String", "modelId": "String!", "layer": "String!", "index": "String!", "embedding": "Unsupported?",
        "description": "String!", "authorId": "String!", "triggeredByUserId": "String?", "notes": "String?",
        "scoreV1": "Float", "scoreV2": "Float?", "typeName": "String?", "explanationModelName": "String?",
        "createdAt": "DateTime", "updatedAt": "DateTime"}}

BY_DATABASE = {"createdAt", "updatedAt", "scoreV1", "scoreV2"}
"""Columns that exports leave out."""
_FILES = {"release": "SourceRelease", "model": "Model", "sourceset": "SourceSet", "source": "Source"}
_FOLDERS = {"features": "Neuron", "activations": "Activation", "explanations": "Explanation"}
_PYTHON = {"String": str, "Visibility": str, "Int": int, "Float": (int, float), "Boolean": bool}


def read(folder, tables=TABLES):
    """The rows of an export by table, each checked."""
    found = {table: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
             for name, table in _FILES.items()}
    for name, table in _FOLDERS.items():
        paths = sorted((folder / name).glob("batch-*.jsonl.gz"), key=lambda path: int(path.name[6:].partition(".")[0]))
        found[table] = []
        for path in paths:
            rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
            assert rows, f"{path} has no lines"
            assert all(list(row) == list(rows[0]) for row in rows), f"the lines of {path} differ in their keys"
            found[table] += rows
        for row in found[table]:
            assert set(row) >= set(tables[table]) - BY_DATABASE - (set(_UMAP) if table == "Explanation" else set())
    for table, rows in found.items():
        for row in rows:
            _check(table, row, tables[table])
    return found


def _check(table, row, columns):
    assert not set(row) - set(columns), f"{table} has no column {set(row) - set(columns)}"
    missing = {name for name, kind in columns.items() if kind.endswith("!")} - set(row)
    assert not missing, f"{table} wants {missing}"
    for name, value in row.items():
        kind = columns[name]
        if value is None:
            assert kind.endswith("?"), f"{table}.{name} is null"
            continue
        python, several = _PYTHON[kind.rstrip("!?[]")], kind.endswith("[]")
        assert isinstance(value, list) == several, f"{table}.{name}"
        for one in value if several else [value]:
            assert isinstance(one, python) and (python is bool or not isinstance(one, bool)), f"{table}.{name}: {one!r}"

"""Artifacts of texts: a folder of JSONL files with a manifest."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_m3.manifest import Manifest, atomic_folder, hash_file, write_manifest


def write_texts(output: Path, texts: Mapping[str, Sequence[Any]], manifest: Manifest) -> None:
    """Write files ``NAME.jsonl`` of JSON values, a line each, as one artifact; ``manifest`` gets the files' hashes."""
    with atomic_folder(output) as folder:
        for name, lines in texts.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        files = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
        write_manifest(folder, replace(manifest, files=files))

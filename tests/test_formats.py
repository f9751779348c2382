"""docs/formats.md names tests as proofs: they must be there."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_proof_is_a_test() -> None:
    text = (HERE.parent / "docs" / "formats.md").read_text()
    proofs = re.findall(r"`(…|[\w/]+\.py)::(test_\w+)`", text)
    assert len(proofs) > 40
    file = ""
    for path, name in proofs:
        file = file if path == "…" else path.removeprefix("tests/")
        source = (HERE / file).read_text()
        assert f"def {name}(" in source, f"{file}::{name}"

"""Any JSON value in any field of a raw row of any kind: it is built or counted with its reason, never a traceback."""

import contextlib
import io
import json
import os
import re
import time
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firefly_lightning.data.sources.row_forms import read_rows
from firefly_lightning.errors import FireflyError
from firefly_lightning.preparation.build import build
from firefly_lightning.preparation.templates.reader import TEMPLATE_FOLDER
from tests.support.fuzzed_rows import VALUES, WORDS, spoilt

SECONDS = float(os.environ.get("FIREFLY_FUZZ_SECONDS", "0"))
EXAMPLES = {
    path.stem: yaml.safe_load(path.read_text("utf-8"))["example"]["row"]
    for path in sorted(TEMPLATE_FOLDER.glob("*.yaml"))
}
"""By its kind, a raw row as it should be."""


@st.composite
def raw_rows(draw: Any) -> tuple[str, list[dict[str, Any]]]:
    """A kind, a good row of it, and rows of which one value or all are any other."""
    kind = draw(st.sampled_from(sorted(EXAMPLES)))
    good = EXAMPLES[kind]
    odd = st.one_of(
        st.builds(lambda: json.loads(json.dumps(good))).flatmap(spoilt),
        st.fixed_dictionaries(dict.fromkeys(good, VALUES), optional={"note": VALUES}),
        st.dictionaries(st.one_of(st.sampled_from(sorted(good)), WORDS), VALUES, max_size=3),
    )
    return kind, [good, *draw(st.lists(odd, max_size=4))]


def test_any_raw_row_is_built_or_counted(tmp_path):
    source, out = tmp_path / "raw.jsonl", tmp_path / "out.jsonl"

    @settings(max_examples=100, suppress_health_check=list(HealthCheck), database=None, deadline=None)
    @given(raw_rows(), st.sampled_from([1, 2, "all"]), st.sampled_from(["skip", "stop"]))
    def check(rows: tuple[str, list[dict[str, Any]]], per_row: Any, bad_rows: Any) -> None:
        kind, raw = rows
        source.write_text("".join(json.dumps(row) + "\n" for row in raw))
        out.unlink(missing_ok=True)
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                build(kind, [str(source)], str(out), per_row=per_row, bad_rows=bad_rows, workers=1)
        except FireflyError as error:
            message = str(error)
            message.encode()
            assert "\n" not in message
            assert len(message) < 1500
            assert bad_rows == "stop"
            assert not out.exists()
            return
        built, lost = list(read_rows(str(out))), sum(map(int, re.findall(r"(\d+) \(", said.getvalue())))
        assert {row.kind for row in built} == {kind}
        assert f"{len(built)} {kind} rows from {len(raw)} raw rows" in said.getvalue()
        assert len(raw) - lost <= len(built)
        assert per_row != 1 or len(built) + lost == len(raw)

    end = time.monotonic() + SECONDS
    check()
    while time.monotonic() < end:
        check()

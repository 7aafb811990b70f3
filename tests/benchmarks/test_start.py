import json

from benchmarks.start import GOALS
from tests.support.helpers import json_lines, run_benchmark


def test_every_command_is_timed_beside_the_floor(model_folder, rows_file, tmp_path):
    out = tmp_path / "start.png"
    text = run_benchmark("start", "--model", model_folder, "--rows", rows_file, "--repeats", 1, "--out", out)
    lines = {line["command"]: line for line in json_lines(text) if "command" in line}
    assert set(GOALS) < set(lines)
    assert all(line["seconds"] > 0 for line in lines.values())
    assert (
        lines["firefly-fit fit"]["seconds"]
        > lines["imports: torch"]["seconds"]
        > lines["firefly --help"]["seconds"] / 9
    )
    assert out.read_bytes().startswith(b"\x89PNG")
    assert json.loads(text.splitlines()[0])["cores"]

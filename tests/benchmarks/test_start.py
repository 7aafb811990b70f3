import json

from benchmarks.start import FLOORS, GOALS
from tests.support.helpers import json_lines, run_benchmark


def test_commands_are_timed_beside_the_floor(model_folder, rows_file, tmp_path):
    out, names = tmp_path / "start.png", ["firefly build --help", "firefly chat", "firefly-fit fit", "imports: torch"]
    assert set(names) <= {*GOALS, *FLOORS}
    few = ["--only", *names, "--repeats", 1, "--warmup", 0]
    text = run_benchmark("start", "--model", model_folder, "--rows", rows_file, *few, "--out", out)
    lines = {line["command"]: line for line in json_lines(text) if "command" in line}
    assert list(lines) == names
    assert lines["firefly-fit fit"]["seconds"] > lines["imports: torch"]["seconds"] > 0
    assert lines["firefly build --help"]["goal"] == 0.6
    assert out.read_bytes().startswith(b"\x89PNG")
    assert json.loads(text.splitlines()[0])["cores"]

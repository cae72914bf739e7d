"""The command line: words, exit codes, and the estimate."""

from __future__ import annotations

import subprocess
import sys

import pytest
from screening_helpers import LIBRARY, make_spec
from standin import StandIn

from bioseq.cli import main
from bioseq.errors import BioseqError, ExpressionError
from serving.screening import cli, run
from serving.screening.estimate import estimate, told
from serving.screening.run import Outcome


def words(text: str):
    parser = cli._parser()
    return cli.spec_from(parser.parse_args(text.split()), parser)


def test_words_become_a_spec(tmp_path):
    spec = words(
        "a.fa b.fa --heads x,y -o run --top 5 --pareto x.value,max(y.a,y.b) --translate six --strict"
    )
    assert spec.inputs == ("a.fa", "b.fa") and spec.heads == ("x", "y") and spec.strict
    assert spec.pareto == ("x.value", "max(y.a,y.b)") and spec.top == 5 and spec.long_sequences == "window"
    assert words("sample --heads x -o run").inputs == (str(LIBRARY),)
    assert words("a.fa --heads x,y -o run --pareto").pareto == ("*",)


def test_a_spec_file_is_taken_and_options_beside_it_win(tmp_path):
    given = make_spec(tmp_path / "run", top=7)
    (tmp_path / "s.json").write_text(given.to_json())
    assert words(f"--spec {tmp_path}/s.json") == given
    assert words(f"--spec {tmp_path}/s.json --top 9").top == 9


@pytest.mark.parametrize(
    "text", ["", "a.fa", "a.fa --heads x", "a.fa --heads x -o r --top 0", "a.fa --banana"]
)
def test_wrong_use_exits_with_2(text, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["screen", *text.split()])
    assert caught.value.code == 2
    assert "bioseq screen -h" in capsys.readouterr().err


@pytest.mark.parametrize("strict, code", [("", 0), (" --strict", 1)])
def test_quarantined_records_are_counted_on_standard_error(monkeypatch, capsys, tmp_path, strict, code):
    summary = {
        "records": 9,
        "distinct": 8,
        "quarantined": 2,
        "counts": {"hits": 3},
        "reasons": {"sequence.empty": 2},
    }
    monkeypatch.setattr(run, "screen", lambda spec, progress: Outcome(tmp_path, summary, False, True))
    assert main(["screen", *f"a.fa --heads x -o r{strict}".split()]) == code
    out = capsys.readouterr()
    assert "2 records were quarantined (2 sequence.empty)" in out.err and out.out == ""


def test_report_of_no_run_is_a_clear_error(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "no finished run" in capsys.readouterr().err


def test_the_estimate_counts_the_library_and_writes_nothing(tmp_path):
    found = estimate(make_spec(tmp_path / "run"), engine=StandIn())
    assert (
        found["records"] == 318
        and (found["distinct"], found["faulty"]) == (303, 3)
        and not found["extrapolated"]
    )
    assert found["tokens"] == found["residues"] + 2 * found["distinct"]
    assert found["tokens_per_second"] > 0 and found["seconds"] > 0 and found["disk_bytes"] > 0
    assert "318" in told(found) and list(tmp_path.iterdir()) == []
    with pytest.raises(ExpressionError):
        estimate(make_spec(tmp_path / "run", where="nothing > 1"), engine=StandIn())
    with pytest.raises(BioseqError):
        estimate(make_spec(tmp_path / "run", inputs=("/nowhere.fa",)), engine=StandIn())


def test_an_estimate_of_a_large_library_is_extrapolated(tmp_path, monkeypatch):
    from serving.screening import estimate as room
    from serving.screening import source

    monkeypatch.setattr(room, "MOST_RECORDS", 50)
    real = source.cut
    monkeypatch.setattr(source, "cut", lambda paths, sizes: real(paths, sizes, 9000))
    found = estimate(make_spec(tmp_path / "run"), engine=StandIn())
    assert found["extrapolated"] and 200 < found["records"] < 480


def test_help_imports_neither_ray_nor_torch():
    code = (
        "import sys, serving.commands\n"
        "try: serving.commands.screen(['-h'])\n"
        "except SystemExit: pass\n"
        "assert not {'ray', 'torch', 'duckdb'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--where EXPR" in done.stdout

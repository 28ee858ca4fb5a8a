"""The common runner of `bin/bench`, on the smallest measurement."""

import json

import pytest

from benchmarks import __main__ as runner


def test_the_list_names_every_measurement(capsys):
    assert runner.main(["--list"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == set(runner.found())
    assert {"codec", "routing"} <= listed


def test_json_is_one_object_on_stdout(capsys):
    assert runner.main(["codec", "--json", "--values", "20000", "--repeats", "1"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert set(report) == {"bench", "commit", "machine", "parameters", "rows"}
    assert report["bench"] == "codec"
    assert report["parameters"] == {"values": 20000, "repeats": 1, "adapter": None, "large": False}
    assert report["machine"]["cores"] >= 1
    for row in report["rows"]:
        assert set(row) == {"name", "value", "unit", "peer", "peer_value", "ratio", "target", "met"}
        assert row["met"] in {None, True, False}
        assert (row["target"] is None) == (row["met"] is None)
        if row["peer_value"]:
            assert row["ratio"] == pytest.approx(row["value"] / row["peer_value"], rel=0.01, abs=1e-3)
    assert "density" in shown.err


def test_what_cannot_be_measured_exits_1_and_wrong_usage_2(capsys):
    assert runner.main(["codec", "--values", "5"]) == 1
    assert "could not be measured" in capsys.readouterr().err
    assert runner.main([]) == 2
    with pytest.raises(SystemExit) as caught:
        runner.main(["no-such-bench"])
    assert caught.value.code == 2


def test_people_get_a_line_per_row():
    rows = [
        {"name": "size", "value": 1234567.0, "unit": "bytes", "peer": "bound", "peer_value": 1000000.0, "ratio": 1.2346,
         "target": 1000000.0, "met": False},
        {"name": "rate", "value": 1.5, "unit": "GB/s", "peer": None, "peer_value": None, "ratio": None, "target": None,
         "met": None},
    ]  # fmt: skip
    assert runner.table(rows).splitlines() == [
        "size  1,234,567 bytes   bound 1,000,000 (x1.23)   target 1,000,000: MISSED",
        "rate  1.5 GB/s",
    ]

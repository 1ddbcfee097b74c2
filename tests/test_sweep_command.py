"""The `sweep` command: what it says, refuses and hands to a scheduler."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest
from planted_sweep import contents, environment, failing, finished, write_study

from sink_circuits import cells, cli


def test_the_command_sweeps_and_says_what_failed(tmp_path, monkeypatch, capsys):
    command = ["sweep", str(write_study(tmp_path / "study.toml")), "--folder", str(tmp_path / "s"), "--quiet"]
    with monkeypatch.context() as patch:
        failing(patch, RuntimeError("no luck"))
        assert cli.main(command) == 1
    said = capsys.readouterr()
    assert "6 cells: 4 done, 2 failed." in said.out and "1 prompts without such sinks" in said.out
    assert "prompt b, layers 2, 6+7" in said.out and "RuntimeError: no luck" in said.out and not said.err
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert "6 cells: 6 done, 0 failed." in said.out and "6+7" in said.out.splitlines()[2]
    summary = pd.read_csv(tmp_path / "s" / "summary.csv", dtype={"layers": str})
    pd.testing.assert_frame_equal(summary, finished().summary(), check_dtype=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workers", "-1"], "--workers -1: at least 0"),
        (["--workers", "2", "--scheduler", "tcp://127.0.0.1:1"], "give one of them"),
        (["--scheduler", ""], "--scheduler is empty"),
    ],
)
def test_the_command_refuses_in_one_sentence(tmp_path, capsys, arguments, message):
    assert (
        cli.main(["sweep", str(write_study(tmp_path / "study.toml")), "--folder", str(tmp_path / "s"), *arguments]) == 2
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_the_help_is_light():
    program = (
        "import sys\nfrom sink_circuits import cli\n"
        "try: cli.main(['sweep', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'pandas', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "study.toml" in done.stdout and "--scheduler" in done.stdout


@pytest.mark.slow
def test_the_command_speaks_to_a_scheduler(tmp_path, capsys):
    distributed = pytest.importorskip("distributed")
    study_file = write_study(tmp_path / "study.toml")
    options = {
        "n_workers": 1,
        "threads_per_worker": 1,
        "processes": False,
        "dashboard_address": None,
        "host": "127.0.0.1",
    }
    with distributed.LocalCluster(**options, protocol="tcp://") as cluster:
        command = [
            "sweep",
            str(study_file),
            "--folder",
            str(tmp_path / "s"),
            "--quiet",
            "--scheduler",
            cluster.scheduler_address,
        ]
        assert cli.main(command) == 0
    cells.release_model()
    (tmp_path / "s" / "summary.csv").unlink()
    assert contents(tmp_path / "s") == contents(finished().folder)

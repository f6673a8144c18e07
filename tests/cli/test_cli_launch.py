"""`hvp launch slurm`: a batch file that runs exactly the given command, and requeues it until it is done."""

import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from hvp.cli.slurm import SlurmJob, sbatch_script
from hvp.common.errors import UserError

RUN = ["pretrain", "dino", "--preset", "vitb16-400ep", "--data", "/data/imagenet"]
# Stand-ins for Slurm's commands: they record their arguments, and srun runs the task.
SRUN = '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n'
HVP = '#!/bin/sh\nprintf "%s\\0" "$@" > seen\necho "$MASTER_ADDR:$MASTER_PORT" > place\nexit $CODE\n'
SCONTROL = (
    '#!/bin/sh\necho "$@" >> asked\ncase "$1 $2" in\n"show hostnames") echo node7; echo node8;;\n'
    '"show job") echo "PreemptEligibleTime=2030-01-01T00:00:00 PreemptTime=$PREEMPTED";;\nesac\n'
)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Return a function that runs a batch file in an empty folder, on a cluster faked by three shell scripts."""
    tools, work = tmp_path / "bin", tmp_path / "work"
    tools.mkdir()
    work.mkdir()
    for name, text in (("srun", SRUN), ("hvp", HVP), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)

    def run(script: str, code: int = 0, preempted: str = "None") -> tuple[int, list[str], str, str]:
        """Return the exit code, hvp's arguments, the rendezvous, and the last call of scontrol."""
        slurm = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": "4"}
        path = f"{tools}:{os.environ['PATH']}"
        env = {**os.environ, **slurm, "PATH": path, "CODE": str(code), "PREEMPTED": preempted}
        done = subprocess.run(["bash", "-c", script], cwd=work, env=env, capture_output=True, text=True)
        assert done.stderr == ""
        arguments = (work / "seen").read_text().split("\0")[:-1]
        asked = (work / "asked").read_text().splitlines()[-1]
        return done.returncode, arguments, (work / "place").read_text().strip(), asked

    return run


def directives(script: str) -> dict[str, str]:
    """Return the options in the lines that sbatch reads, which end at the first command."""
    lines = script.splitlines()
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[end:])
    options = [line.removeprefix("#SBATCH --") for line in lines[:end] if line.startswith("#SBATCH")]
    return {option.partition("=")[0]: option.partition("=")[2] for option in options}


def test_the_file_requests_the_given_resources(hvp, tmp_path):
    resources = [
        "--nodes",
        2,
        "--gpus-per-node",
        8,
        "--cpus-per-task",
        6,
        "--time",
        "1-12:00:00",
        "--partition",
        "a100",
    ]
    ran = hvp("launch", "slurm", *resources, "--account", "vision", "--out", "job.sh", "--", *RUN)
    assert ran.code == 0, ran.err
    assert ran.out == "wrote job.sh; queue it with: sbatch job.sh\n"
    script = (tmp_path / "job.sh").read_text()
    assert subprocess.run(["bash", "-n", "job.sh"], cwd=tmp_path).returncode == 0
    assert directives(script) == {
        "job-name": "dino-vitb16-400ep",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "6",
        "time": "1-12:00:00",
        "partition": "a100",
        "account": "vision",
        "requeue": "",
        "output": "%x-%j.out",
        "open-mode": "append",
        "signal": "USR1@120",
    }
    assert max(map(len, script.splitlines()[2:])) <= 120
    assert (
        hvp("launch", "slurm", *resources, "--account", "vision", "--", *RUN).out.splitlines()[2:]
        == (script.splitlines()[2:])
    )


def test_other_options_and_setup_lines(hvp, tmp_path, cluster):
    """Options of sbatch join the others; setup lines run before the command, in order, and may contain anything."""
    asked = ["--qos", "high", "--mem", "120G", "--constraint", "a100|h100", "--sbatch=--exclusive"]
    asked += ["--sbatch", "--mail-user=me@example.org", "--setup", 'export CODE="7"', "--setup", "echo $CODE > ready"]
    ran = hvp("launch", "slurm", *asked, "--", *RUN)
    assert ran.code == 0, ran.err
    found = directives(ran.out)
    assert {"qos": "high", "mem": "120G", "constraint": "a100|h100", "exclusive": ""}.items() <= found.items()
    assert found["mail-user"] == "me@example.org"
    status, arguments, _, _ = cluster(ran.out)
    assert status == 7  # of the stand-in for hvp, which read CODE
    assert arguments[: len(RUN)] == RUN
    assert (tmp_path / "work" / "ready").read_text() == "7\n"


def test_an_existing_file_is_kept(hvp, tmp_path):
    (tmp_path / "job.sh").write_text("mine")
    ran = hvp("launch", "slurm", "--out", "job.sh", "--", *RUN)
    assert ran.code == 2
    assert "job.sh: already exists" in ran.err
    assert (tmp_path / "job.sh").read_text() == "mine"


def test_the_command_is_passed_on_unchanged(hvp, cluster):
    awkward = ["--data", '/data/it\'s "here" $HOME', "--set", "data.path=a\nb; exit 3", "--config", "no `such` file"]
    script = sbatch_script(SlurmJob("a", 1, 1, 1, "60"), [*RUN, *awkward], made_by=["launch", *awkward], resumes=True)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    code, arguments, place, _ = cluster(script)
    assert code == 0
    assert arguments == [*RUN, *awkward]
    assert place == "node7:10007"


def test_a_run_gets_its_folder_and_resumes(hvp, cluster):
    for separator in (["--"], []):
        script = hvp("launch", "slurm", *separator, *RUN, "--seed", "3").out
        usual = ["--out", "runs/dino/vitb16-400ep/seed3", "--resume"]
        assert cluster(script)[1] == [*RUN, "--seed", "3", *usual]
    given = ["--out", "my runs/1", "--resume"]
    assert cluster(hvp("launch", "slurm", "--", *RUN, *given).out)[1] == [*RUN, *given]


@pytest.mark.parametrize(
    ("code", "preempted", "again"),
    [
        (0, "None", False),
        (1, "None", False),
        (2, "2030-01-01T00:00:00", False),  # the same error would occur again
        (75, "None", True),
        (143, "None", False),
        (143, "2030-01-01T00:00:00", True),
    ],
)
def test_a_run_that_stopped_early_is_requeued(hvp, cluster, code, preempted, again):
    script = hvp("launch", "slurm", "--", *RUN).out
    status, _, _, asked = cluster(script, code, preempted)
    assert status == code
    assert (asked == "requeue 20007") == again


def test_other_commands_are_one_process_and_are_not_requeued(hvp, cluster):
    ran = hvp("launch", "slurm", "--", "eval", "knn", "run/last.pt", "--data", "shapes")
    assert "signal" not in directives(ran.out)
    assert directives(ran.out)["job-name"] == "hvp-eval-knn"
    status, arguments, _, asked = cluster(ran.out, code=75)
    assert arguments == ["eval", "knn", "run/last.pt", "--data", "shapes"]
    assert (status, asked) == (75, "show hostnames node[7-8]")
    ran = hvp("launch", "slurm", "--nodes", "2", "--", "eval", "knn", "run/last.pt", "--data", "shapes")
    assert ran.code == 2
    assert "hvp eval knn is a single process" in ran.err


@pytest.mark.parametrize(
    ("options", "command", "message"),
    [
        ([], "pretrain dino --preset vitb16-400e", "Did you mean vitb16-400ep?"),
        ([], "pretrain dinno", "unknown method dinno"),
        ([], "pretrain dino --set optim.bas_lr=1", "Did you mean optim.base_lr?"),
        ([], "pretrain dino --config none.yaml", "none.yaml: cannot be read"),
        ([], "pretrain dino --epochs many", "valid integer"),
        ([], "pretrain dino --hard-views maybe", "'maybe' is not one of"),
        ([], "pretrain dino --preest tiny", "No such option"),
        ([], "pretrian dino", "No such command"),
        ([], "pretrain dino --dry-run", "nothing to queue"),
        ([], "pretrain dino --overwrite", "would delete the run"),
        ([], "pretrain --help", "runs nothing"),
        (["--gpus-per-node", "3"], "pretrain dino", "512 does not divide among 3 processes"),
        (["--time", "soon"], "pretrain dino", "--time soon: must read"),
        (["--partition", "a b"], "pretrain dino", "--partition 'a b': must be one word"),
        (["--job-name", "a\nrm"], "pretrain dino", "must be one word"),
        (["--nodes", "0"], "pretrain dino", "--nodes"),
        (["--qos", "a b"], "pretrain dino", "--qos 'a b': must be one word"),
        (["--mem", "much"], "pretrain dino", "--mem 'much': must be a number"),
        (["--constraint", "a;b"], "pretrain dino", "--constraint 'a;b': must be node features"),
        (["--constraint", "a\nb"], "pretrain dino", "must be node features"),
        (["--sbatch", "exclusive"], "pretrain dino", "must be one option of sbatch"),
        (["--sbatch", "--comment=a\n#SBATCH --nodes=9"], "pretrain dino", "must be one option of sbatch"),
        (["--sbatch", "--nodes=9"], "pretrain dino", "hvp writes --nodes itself; use hvp's own --nodes"),
        (["--sbatch", "--signal=USR1@5"], "pretrain dino", "hvp writes --signal itself, and relies on it"),
        (["--setup", "a\nb"], "pretrain dino", "must be one line of shell"),
        (["--setup", " "], "pretrain dino", "must be one line of shell"),
    ],
)
def test_errors_are_reported_before_anything_is_queued(hvp, tmp_path, options, command, message):
    ran = hvp("launch", "slurm", *options, "--out", "job.sh", "--", *shlex.split(command))
    assert ran.code == 2
    assert message in ran.err
    assert not any(Path(tmp_path).iterdir())


@pytest.mark.parametrize("time", ["60", "30:00", "24:00:00", "2-0", "2-12:30", "7-00:00:00"])
def test_slurm_time_formats(time):
    SlurmJob("a", 1, 1, 1, time)
    with pytest.raises(UserError):
        SlurmJob("a", 1, 1, 1, time + ":")

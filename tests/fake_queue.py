"""A batch queue whose jobs are processes here, under the commands of Slurm, PBS, LSF and SGE."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

_COMMANDS = {
    "slurm": ("sbatch", "scancel", "squeue"),
    "pbs": ("qsub", "qdel", "qstat"),
    "sge": ("qsub", "qdel", "qstat"),
    "lsf": ("bsub", "bkill", "bjobs"),
}
_ANSWERS = {
    "slurm": "Submitted batch job $id",
    "pbs": "$id.server",
    "sge": 'Your job $id ("dask-worker") has been submitted',
    "lsf": "Job <$id> is submitted to queue <day>.",
}
_ROWS = {
    "slurm": "$id $state None",
    "pbs": "$id.server    somebody day    dask-worker  --   1   1    2gb 00:30 R 00:00",
    "sge": "    $id 0.55500 dask-worke somebody     r     11/23/2026 22:41:39 day@here    1",
    "lsf": "$id $state",
}

_SCRIPT = """\
#!/bin/bash
cd {folder}
case $(basename "$0") in
{submit})
  if [ -e refuse ]; then cat refuse >&2; exit 1; fi
  id=$$
  cat "${{1:-/dev/stdin}}" > $id.sh
  if [ -e hold ]; then touch $id.held; else
    setsid bash $id.sh > $id.out 2>&1 < /dev/null &
    echo $! > $id.pid
  fi
  echo "{answer}" ;;
{cancel})
  for id in "$@"; do
    rm -f $id.held
    pid=$(cat $id.pid 2> /dev/null)
    # The job leads its process group; never -1, which would be everybody.
    [ "${{pid:-0}}" -gt 1 ] && kill -TERM -- -$pid 2> /dev/null
    rm -f $id.pid
  done
  true ;;
{list})
  echo asked >> asked
  [ -e silent ] && exit 1
  state=PENDING
  for file in *.held; do
    [ -e $file ] && id=${{file%.held}} && echo "{row}"
  done
  state=RUNNING
  for file in *.pid; do
    [ -e $file ] && id=${{file%.pid}} && kill -0 $(cat $file) 2> /dev/null && echo "{row}"
  done
  true ;;
esac
"""


class FakeQueue:
    """Its commands lie in ``bin``; files ``hold``, ``silent`` and ``refuse`` change how they answer."""

    def __init__(self, kind: str, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        submit, cancel, lists = _COMMANDS[kind]
        for name in (submit, cancel, lists):
            script = self.bin / name
            names = {"submit": submit, "cancel": cancel, "list": lists}
            script.write_text(_SCRIPT.format(folder=folder, answer=_answer(kind), row=_ROWS[kind], **names))
            script.chmod(0o755)

    @property
    def jobs(self) -> list[str]:
        """Numbers of all jobs that were ever submitted, oldest first."""
        return [path.stem for path in sorted(self.folder.glob("*.sh"), key=lambda path: path.stat().st_mtime)]

    @property
    def alive(self) -> list[str]:
        """Numbers of the jobs that run."""
        return [number for number in self.jobs if _runs(self.folder / f"{number}.pid")]

    def close(self) -> None:
        for number in self.alive:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                os.killpg(_pid(self.folder / f"{number}.pid"), signal.SIGKILL)


def _answer(kind: str) -> str:
    return _ANSWERS[kind].replace('"', '\\"')


def _pid(file: Path) -> int:
    pid = int(file.read_text())
    assert pid > 1
    return pid


def _runs(file: Path) -> bool:
    try:
        return Path(f"/proc/{_pid(file)}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ValueError):
        return False

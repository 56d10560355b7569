"""Where the work runs: this process, this machine's cores and GPUs, jobs of a queue, or a Dask scheduler.

`start_workers` turns settings into `Workers`; a `Window` of it runs tasks, a bounded number at a time.
Covers processes, threads, labels and windows. Does not cover images, studies or networks: a task is an
importable function with small arguments and a small result, and pixels go through files.

Labels. Where some worker declares the resource ``GPU``, tasks of kind ``network`` run on such workers only;
where some worker declares ``CPU``, all other tasks run on those. Without labels everything runs anywhere.
Resources are asked for at `submit`, which holds; `dask.annotate` is lost when arrays fuse (dask/dask#7036).
The scheduler does not queue tasks that ask for resources, so the window does. A task may itself have
workers (`Workers.of_task`): its own process, and those labelled GPU for its network work.
"""

from daskcell.compute.local import visible_gpus
from daskcell.compute.process import THREAD_VARIABLES, limit_threads, threads_limited
from daskcell.compute.start import start_workers
from daskcell.compute.task_queue import LABELS, Failed, Kind, Reschedule, Window, Workers, WorkersRef

__all__ = [
    "LABELS",
    "THREAD_VARIABLES",
    "Failed",
    "Kind",
    "Reschedule",
    "Window",
    "Workers",
    "WorkersRef",
    "limit_threads",
    "start_workers",
    "threads_limited",
    "visible_gpus",
]

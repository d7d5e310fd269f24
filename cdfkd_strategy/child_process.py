"""A process that was started for a part of the work does not outlive the one that started it."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """To be called first in a process of `multiprocessing`: it ends as soon as the process that started it is gone, however that ended.

    One that is killed cannot end the processes it started, which would go on beside those of whoever continues its work.
    """
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

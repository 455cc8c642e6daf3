"""Actors whose drafters start fast, and who places them: `python tests/ray_drafters.py ACTOR FD JSON` is the agent of a
target, `python tests/ray_drafters.py ACTOR pool ...` the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fork_server

from vllm_ssd.pool.actor import DrafterActor
from vllm_ssd.pool.agent import main

LISTENING = Path(__file__).with_name("listening_drafter.py")


def start_fake(command: Sequence[str], keeper: int, environment: Mapping[str, str]) -> Any:
    """A drafter of `listening_drafter`."""
    command = [command[0], str(LISTENING), *command[3:]]
    return subprocess.Popen(command, pass_fds=[keeper], env=environment, stdin=subprocess.DEVNULL)


def start_forked(command: Sequence[str], keeper: int, environment: Mapping[str, str]) -> Any:
    """A real drafter, from the fork server that the cluster was started with."""
    return fork_server.fork(os.environ[fork_server.ADDRESS], "listener", command[3:], keeper, environment)


class FakeDrafterActor(DrafterActor):
    start_process = staticmethod(start_fake)


class ForkedDrafterActor(DrafterActor):
    start_process = staticmethod(start_forked)


if __name__ == "__main__":
    import ray_drafters  # not __main__, which no worker could import the class from

    actor = getattr(ray_drafters, sys.argv[1])
    if sys.argv[2] != "pool":
        sys.exit(main(int(sys.argv[2]), sys.argv[3], actor))
    from vllm_ssd.cli import app
    from vllm_ssd.pool.pool import Pool

    Pool.actor = actor
    app(sys.argv[2:])

"""Slurm signals the task; the processes in the guest get what they would have got without it."""

import signal

import pytest

from carrel.process import process_state
from carrel.testing.guests import wait_for
from carrel.testing.relay import RelayNode

LOOP = "echo up; while :; do sleep 0.02; done"


def state_of(pid: int) -> str:
    """Return the state of a process: ``S`` sleeps, ``T`` is stopped."""
    state = process_state(pid)
    return state[0] if state else ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGRTMIN + 1, signal.SIGHUP])
def test_a_signal_to_the_task_reaches_its_command(node: RelayNode, number: int) -> None:
    with node.spawn("sh", "-c", f"trap 'exit 9' {int(number)}; {LOOP}") as task:
        task.stdout.readline()
        task.send_signal(number)
        assert task.wait(30) == 9


def test_a_signal_that_a_command_does_not_handle_is_the_end_of_its_task(node: RelayNode) -> None:
    with node.spawn("sh", "-c", "echo up; exec sleep 60") as task:
        task.stdout.readline()
        task.send_signal(signal.SIGUSR2)
        assert task.wait(30) == -signal.SIGUSR2


def test_stop_and_continue_reach_every_process(node: RelayNode) -> None:
    with node.spawn("sh", "-c", "trap 'exit 4' CONT; " + LOOP) as task:
        task.stdout.readline()
        task.send_signal(signal.SIGCONT)
        assert task.wait(30) == 4


def test_tstp_stops_a_command_that_does_not_handle_it_until_it_is_continued(node: RelayNode) -> None:
    with node.spawn("sh", "-c", "echo $$; exec sleep 60") as task:
        command = int(task.stdout.readline())
        task.send_signal(signal.SIGTSTP)
        wait_for(lambda: state_of(command) == "T", timeout_s=30)
        task.send_signal(signal.SIGCONT)
        wait_for(lambda: state_of(command) == "S", timeout_s=30)


def test_tstp_is_left_to_a_command_that_handles_it(node: RelayNode) -> None:
    with node.spawn("sh", "-c", "trap 'exit 6' TSTP; sleep 60 & echo up; wait") as task:
        task.stdout.readline()
        task.send_signal(signal.SIGTSTP)
        assert task.wait(30) == 6


def test_term_reaches_the_children_of_a_batch_script_too(node: RelayNode) -> None:
    script = node.directory / "slurm_script"
    script.write_text("#!/bin/sh\ntrap 'echo trapped' TERM\nsh -c 'echo up; exec sleep 60'\necho after $?\n")
    with node.spawn(str(script)) as task:
        task.stdout.readline()
        task.send_signal(signal.SIGTERM)
        assert task.stdout.read() == b"trapped\nafter 143\n"
        assert task.wait(30) == 0


def test_usr1_reaches_a_batch_script_and_not_its_children(node: RelayNode) -> None:
    script = node.directory / "slurm_script"
    script.write_text("#!/bin/sh\ntrap 'echo trapped' USR1\nsh -c 'echo up; exec sleep 1'\necho slept $?\n")
    with node.spawn(str(script)) as task:
        task.stdout.readline()
        task.send_signal(signal.SIGUSR1)
        # The shell runs its trap when the sleep is over; the sleep itself was not hit.
        assert task.stdout.read() == b"trapped\nslept 0\n"

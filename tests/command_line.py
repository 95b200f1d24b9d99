"""Command lines run inside the test's own process: what `main` prints and returns, without seconds of imports.

What a process alone can show (files of its own, signals, pipes, terminals, what libraries print) is tested in one.
"""

import contextlib
import io
import os
import subprocess
import sys

import pytest


def run_main(main, *arguments, cwd=None, typed="", **environment) -> subprocess.CompletedProcess:
    """Calls `main(arguments)` as a shell would start its program, and undoes what it sets of the surroundings.

    Args:
        main: Takes a list of texts and returns the exit status, or raises SystemExit with it.
        arguments: Anything whose `str` is meant.
        cwd: The folder it runs in.
        typed: What standard input holds.
        environment: Variables to set.

    Returns:
        Exit status and what was printed, like `subprocess.run`.
    """
    out, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        # Also what the program itself sets.
        _restored(os.environ),
    ):
        patch.setattr(sys, "stdin", io.StringIO(typed))
        os.environ.update({"HF_HUB_OFFLINE": "1", **environment})
        if cwd is not None:
            patch.chdir(cwd)
        arguments = list(map(str, arguments))
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = ended.code
    return subprocess.CompletedProcess(arguments, status or 0, out.getvalue(), errors.getvalue())


@contextlib.contextmanager
def _restored(mapping):
    before = dict(mapping)
    try:
        yield
    finally:
        mapping.clear()
        mapping.update(before)


def one_line_error(done: subprocess.CompletedProcess) -> str:
    """The line of a program that refused, after making sure that it said nothing else."""
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr

"""Real `olmoscope` commands that start fast, for tests that run many or kill them."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

LIBRARIES = ("torch.distributed.tensor", "torch._dynamo.convert_frame", "scipy.optimize", "numba.np.ufunc.parallel",
             "pyarrow.parquet", "olmoscope.cli.app", "olmoscope.pipeline", "olmoscope.kernels.cpu",
             "olmoscope.features.build")
"""Modules that are slow to import and read no settings of the Hugging Face hub."""
WITH_TRANSFORMERS = (*LIBRARIES, "transformers.models.olmo3.modeling_olmo3", "transformers.convert_slow_tokenizer")


class Commands:
    """Starts `olmoscope` commands through fork_server.py and waits for them."""

    def __init__(self, folder, *, modules=WITH_TRANSFORMERS, **environment):
        self.folder = folder
        self.server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("fork_server.py")), *modules],
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                                                         "COLUMNS": "200"} | environment)
        self.started = 0

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *arguments, **constants):
        """Start a command; returns its pid and the file of its output.

        Args:
            constants: values to give to constants of modules, `a__b=1` for olmoscope.a's b.
        """
        self.started += 1
        output = self.folder / f"output-{self.started}"
        pid = self.ask(start=[str(argument) for argument in arguments], output=str(output), constants=constants)
        return pid, output

    def start_as(self, environment, *arguments, **code):
        """Start a command with its own environment and separate output streams; returns its pid and the files of both.

        Args:
            code: `code=...`, Python to run instead of the command.
        """
        self.started += 1
        output, errors = (self.folder / f"{name}-{self.started}" for name in ("output", "errors"))
        pid = self.ask(start=[str(argument) for argument in arguments], output=str(output), errors=str(errors),
                       environment=dict(environment), **code)
        return pid, output, errors

    def wait(self, pid, seconds=240.0):
        """Exit status (negative: the signal), or None if it still runs after `seconds`."""
        return self.ask(wait=pid, seconds=seconds)

    def run(self, *arguments, **constants):
        """Run a command to its end; returns exit status and output."""
        pid, output = self.start(*arguments, **constants)
        return self.wait(pid), output.read_text()

    def close(self):
        self.server.stdin.close()
        self.server.wait()


@functools.cache
def shared_commands(modules: tuple[str, ...] = WITH_TRANSFORMERS) -> Commands:
    """The server that all tests of this process share. Commands that use a hub need a server with only `LIBRARIES`:
    huggingface_hub reads its settings when it is imported."""
    folder = tempfile.TemporaryDirectory(prefix="commands-")
    commands = Commands(Path(folder.name), modules=modules)
    atexit.register(folder.cleanup)
    atexit.register(commands.close)
    return commands


def run_forked(*arguments: object, environment: Mapping[str, str] | None = None, timeout: float = 240.0,
               hub: bool = False, **code: str) -> subprocess.CompletedProcess[str]:
    """The result of an `olmoscope` command, as from `subprocess.run`, in a process that starts fast.

    Args:
        environment: the variables of the command; this process's by default.
        hub: whether it uses a hub that `environment` names.
        code: `code=...`, Python to run instead of the command.
    """
    commands = shared_commands(LIBRARIES if hub else WITH_TRANSFORMERS)
    pid, output, errors = commands.start_as(os.environ if environment is None else environment, *arguments, **code)
    status = commands.wait(pid, timeout)
    assert status is not None, f"{arguments} still runs after {timeout} s: {errors.read_text()}"
    return subprocess.CompletedProcess(arguments, status, output.read_text(), errors.read_text())

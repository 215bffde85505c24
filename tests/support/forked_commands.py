"""A folder for the front of the path, with a ``python`` and a ``diffaccel`` whose processes start at once."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from command_server import client

SERVER = Path(__file__).with_name("command_server.py")
IMPORTED = (  # what takes the seconds of a command's start; the names are imported by diffusers when asked for
    "diffusers:FluxPipeline,StableDiffusionPipeline,DDPMPipeline,WanPipeline,DiTPipeline,AutoencoderKL",
    "transformers:CLIPTextModel,CLIPTokenizer,T5EncoderModel,T5TokenizerFast,PreTrainedTokenizerFast",
    "torch._inductor.config", "torch._dynamo", "torch.fx.experimental.proxy_tensor", "accelerate", "peft", "PIL.Image",
    "diffaccel.cli.sample", "diffaccel.cli.quantize", "diffaccel.cli.distill", "diffaccel.eval.commands",
)  # fmt: skip


@contextlib.contextmanager
def forked_commands(
    environment: dict[str, str], imported: tuple[str, ...] = IMPORTED, unread: tuple[str, ...] = ()
) -> Iterator[dict[str, str]]:
    """Serve commands until the end of the block, and yield the environment in which they are found.

    Args:
        environment: of the commands, that of this process where a name is not in it. Commands in another environment
            start as they always do.
        imported: modules, each with the names to ask it for, ``module:name,name``.
        unread: variables that nothing imported reads: commands may have others.
    """
    with tempfile.TemporaryDirectory(prefix="served-") as folder:
        socket, programs = f"{folder}/socket", Path(folder) / "bin"
        programs.mkdir()
        environment = os.environ | environment
        environment["PATH"] = os.pathsep.join([str(programs), environment.get("PATH", os.defpath)])
        for name in ("python", "diffaccel"):
            program = programs / name
            program.write_text(client(str(Path(sys.executable).with_name(name)), socket, environment, unread))
            program.chmod(0o755)
        server = subprocess.Popen(
            [sys.executable, SERVER, socket, *imported], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            yield environment
        finally:
            server.communicate()  # closes its stdin, which ends it

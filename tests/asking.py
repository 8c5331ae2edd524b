"""--help of the commands in a new process."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

# Runs each command with --help, as python -m does: prints the help and what is then imported that takes long.
HELP = """
import contextlib, io, json, runpy, sys
helps, imported = {}, {}
heavy = {"torch", "timm", "torchvision", "nvidia.dali", "matplotlib", "captum"}
for module, command in json.loads(sys.argv[1]):
    sys.argv = [*command.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__")
    helps[command] = text.getvalue()
    imported[command] = sorted(heavy & set(sys.modules))
from resnest_imagenet.commands.launch import find_conf
print(json.dumps([helps, imported, str(find_conf())]))
"""
MODULES = {script.name: script.module for script in entry_points(group="console_scripts")}


def ask_for_help(folder, *commands, **environment):
    """Ask for the help of commands in one new process, in a folder.

    Args:
        folder: where it runs.
        commands: each with the words before --help: "resnest-data demo task=detection".
        **environment: added to this process's.

    Returns:
        By command: the help, and the slow packages that were imported for it. And the folder of conf/.
    """
    asked = json.dumps([(MODULES[command.split()[0]], command) for command in commands])
    environment = {**os.environ, "COLUMNS": "80", **environment}
    command = [sys.executable, "-c", HELP, asked]
    return json.loads(subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True).stdout)

"""Files that are written whole or not at all, whatever is there, and on file systems that lack a call."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading

import pytest

from resnest_imagenet import files
from resnest_imagenet.errors import ConfigError, StorageError
from resnest_imagenet.files import file_lock, record_lock, remove_temporary, require_writable, write_atomically


def write(path, content):
    with write_atomically(path) as file:
        file.write(content)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_mode_owner_and_link_stay(tmp_path):
    real, link = tmp_path / "elsewhere/real.csv", tmp_path / "link.csv"
    real.parent.mkdir()
    link.symlink_to("elsewhere/real.csv")
    write(link, b"new")  # of a link to nothing too
    umask = os.umask(0)
    os.umask(umask)
    assert link.is_symlink() and mode_of(real) == 0o666 & ~umask
    real.chmod(0o600)
    owner = (1234, 4321) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(real, *owner)
    write(link, b"newer")
    assert link.is_symlink() and real.read_bytes() == b"newer" and mode_of(real) == 0o600
    assert (real.stat().st_uid, real.stat().st_gid) == owner
    assert [path.name for path in real.parent.iterdir()] == ["real.csv"]


def test_nothing_of_others_is_touched(tmp_path):
    out, own, victim = (tmp_path / name for name in ("x.csv", "x.csv.tmp", "victim"))
    victim.write_text("alive")
    own.symlink_to(victim)
    with write_atomically(out) as one, write_atomically(out) as other:
        one.write(b"1" * 1000)
        other.write(b"2" * 1000)
    assert out.read_bytes() == b"1" * 1000  # the last to end; neither is torn
    with pytest.raises(ZeroDivisionError), write_atomically(out) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert out.read_bytes() == b"1" * 1000
    assert victim.read_text() == "alive" and sorted(tmp_path.iterdir()) == sorted([out, own, victim])
    write(tmp_path / ("n" * 255), b"")  # no longer name is possible


@pytest.mark.process
def test_only_what_a_killed_writer_has_left_is_removed(tmp_path):
    left = "import os, sys\nfrom pathlib import Path\nfrom resnest_imagenet.files import write_atomically\n"
    left += "with write_atomically(Path(sys.argv[1])): os._exit(9)"
    for name in ("best.pt", "mine.json"):
        subprocess.run([sys.executable, "-c", left, tmp_path / name], check=False)
    for name in ("best.pt.tmp", ".best.pt.swp.tmp", "cache.tmp"):
        (tmp_path / name).touch()
    before = set(tmp_path.iterdir())
    remove_temporary(tmp_path, ["best.pt", "step-*.pt"])
    (gone,) = before - set(tmp_path.iterdir())
    assert gone.name.startswith(".best.pt.") and len(before) == 5


@pytest.mark.process
def test_devices_and_pipes_are_written_to(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write(pipe, b"through the pipe")
    reader.join(10)
    assert read == [b"through the pipe"] and stat.S_ISFIFO(pipe.stat().st_mode)
    null = tmp_path / "null"
    null.symlink_to("/dev/null")
    require_writable(null, "out")
    write(null, b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(StorageError, match="it is a folder"):
        write(tmp_path, b"")
    script = (
        "import sys\nfrom pathlib import Path\nfrom resnest_imagenet.files import write_atomically\nprint('before')\n"
    )
    script += "with write_atomically(Path('/dev/stdout')) as file: file.write(b'between, ')\nprint('after')"
    with open(tmp_path / "out.txt", "wb") as out:
        subprocess.run([sys.executable, "-c", script], stdout=out, check=True)
    assert (tmp_path / "out.txt").read_text() == "before\nbetween, after\n"


def failing(real, number, holds=lambda descriptor: True):
    def call(descriptor, *rest):
        if holds(descriptor):
            raise OSError(number, os.strerror(number))
        return real(descriptor, *rest)

    return call


def test_a_file_system_that_cannot_synchronise_folders_is_said_once(tmp_path, monkeypatch, capsys):
    def is_folder(descriptor):
        return stat.S_ISDIR(os.fstat(descriptor).st_mode)

    monkeypatch.setattr(files, "_warned", set())
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", failing(fsync, errno.EINVAL, is_folder))
    for name in ("a", "b"):
        write(tmp_path / name, b"whole")
        assert (tmp_path / name).read_bytes() == b"whole"
    assert capsys.readouterr().err == (
        f"WARNING: {tmp_path}: cannot be synchronised to the disk there (Invalid argument): "
        "what was written last may be lost if the machine crashes\n"
    )
    monkeypatch.setattr(os, "fsync", failing(fsync, errno.EIO, is_folder))
    with pytest.raises(StorageError, match="c: cannot be written .Input/output error"):
        write(tmp_path / "c", b"")


def test_a_folder_that_may_only_be_written_to_is_enough(tmp_path, monkeypatch):
    def may_not_list(path, flags, *rest, real=os.open, **options):
        if flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", may_not_list)  # root may list any
    write(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_the_work_is_done_and_that_is_said_once(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "_warned", set())
    monkeypatch.setattr(fcntl, "lockf", failing(fcntl.lockf, number))
    for _ in range(2):
        with record_lock(tmp_path / "lock", "process 1 on here"):
            assert (tmp_path / "lock").read_text() == "process 1 on here"
    assert (tmp_path / "lock").read_text() == ""
    line = f"no file locks there ({os.strerror(number)}): a second process in this folder will not be refused\n"
    assert capsys.readouterr().err == f"WARNING: {tmp_path}/lock: {line}"
    if number != errno.ENOSYS:  # filelock has its own answer to that one
        monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, number))
        with file_lock(tmp_path / "other"):
            pass


def test_a_lock_is_no_file_of_somebody_else(tmp_path):
    victim, lock = tmp_path / "victim", tmp_path / "lock"
    victim.write_text("alive")
    lock.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), record_lock(lock, "process 1 on here"):
        pass
    with pytest.raises(ConfigError, match="victim: not the lock of a run"), record_lock(victim, "process 1 on here"):
        pass
    assert victim.read_text() == "alive"

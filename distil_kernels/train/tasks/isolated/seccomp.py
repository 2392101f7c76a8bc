"""The system calls that a program may make: a seccomp filter of those named here; any other fails with EPERM.

Numbers are those of the two architectures' tables (asm/unistd_64.h; asm-generic/unistd.h). Calls whose effect depends
on an argument are in ARGUMENTS. A filter sees numbers, not memory: what a path may be is Landlock's and the mount
namespace's to say.
"""

from __future__ import annotations

import platform
import struct
from typing import NamedTuple

_BOTH = {  # name: (x86_64, aarch64)
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68),
    "readv": (19, 65), "writev": (20, 66), "sched_yield": (24, 124), "mremap": (25, 216), "msync": (26, 227),
    "mincore": (27, 232), "madvise": (28, 233), "dup": (32, 23), "nanosleep": (35, 101), "getitimer": (36, 102),
    "setitimer": (38, 103), "getpid": (39, 172), "recvfrom": (45, 207), "shutdown": (48, 210),
    "getsockname": (51, 204), "getpeername": (52, 205), "setsockopt": (54, 208), "getsockopt": (55, 209),
    "exit": (60, 93), "wait4": (61, 260), "uname": (63, 160), "flock": (73, 32), "fsync": (74, 82),
    "fdatasync": (75, 83), "ftruncate": (77, 46), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "umask": (95, 166), "gettimeofday": (96, 169), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153),
    "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173),
    "getgroups": (115, 158), "getresuid": (118, 148), "getresgid": (120, 150), "getpgid": (121, 155),
    "getsid": (124, 156), "capget": (125, 90), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "statfs": (137, 43), "fstatfs": (138, 44),
    "sched_getparam": (143, 121), "sched_getscheduler": (145, 120), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "gettid": (186, 178), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "set_tid_address": (218, 96), "restart_syscall": (219, 128), "fadvise64": (221, 223), "timer_create": (222, 107),
    "timer_settime": (223, 110), "timer_gettime": (224, 108), "timer_getoverrun": (225, 109),
    "timer_delete": (226, 111), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_ctl": (233, 21), "openat": (257, 56),
    "mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38),
    "linkat": (265, 37), "symlinkat": (266, 36), "faccessat": (269, 48),
    "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99), "get_robust_list": (274, 100),
    "epoll_pwait": (281, 22), "timerfd_create": (283, 85), "fallocate": (285, 47), "timerfd_settime": (286, 86),
    "timerfd_gettime": (287, 87), "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24),
    "pipe2": (293, 59), "preadv": (295, 69), "pwritev": (296, 70), "getcpu": (309, 168), "renameat2": (316, 276),
    "getrandom": (318, 278), "membarrier": (324, 283), "copy_file_range": (326, 285), "statx": (332, 291),
    "rseq": (334, 293), "close_range": (436, 436), "faccessat2": (439, 439), "epoll_pwait2": (441, 441),
}  # fmt: skip
_X86_64_ALONE = {
    "open": 2, "stat": 4, "lstat": 6, "poll": 7, "access": 21, "pipe": 22, "select": 23, "dup2": 33, "pause": 34,
    "alarm": 37, "getdents": 78, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87,
    "symlink": 88, "getrlimit": 97, "getpgrp": 111, "arch_prctl": 158, "time": 201,
    "epoll_wait": 232, "eventfd": 284, "epoll_create": 213,
}  # fmt: skip
_ALSO = {"getdents64": (217, 61), "sendfile": (40, 71)}
IN_A_PRIVATE_TREE = {
    "truncate": (76, 45), "readlinkat": (267, 78), "fchmod": (91, 52), "fchmodat": (268, 53), "utimensat": (280, 88),
}  # fmt: skip
"""Calls that Landlock does not restrict (or, truncate, not in its first versions): only where every path that a
program can name is its own or read-only."""
_X86_64_IN_A_PRIVATE_TREE = {"readlink": 89, "chmod": 90}
_CLONE, _CLONE3 = (56, 220), (435, 435)

_THREAD, _NAMESPACES = 0x10000, 0x7E020000  # CLONE_THREAD; CLONE_NEW*
_ENOSYS, _EPERM = 38, 1
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _HAS_ANY, _AND, _RETURN = 0x20, 0x15, 0x45, 0x54, 0x06  # BPF_LD|W|ABS, JMP|JEQ|K, JMP|JSET|K, ...
_ARGUMENTS_AT = 16  # struct seccomp_data: nr, arch, instruction pointer, args[6]


class Architecture(NamedTuple):
    """Where a machine's numbers stand."""

    column: int
    audit: int
    """AUDIT_ARCH_* of linux/audit.h."""


ARCHITECTURES = {"x86_64": Architecture(0, 0xC000003E), "aarch64": Architecture(1, 0xC00000B7)}


class Rule(NamedTuple):
    """A call that is allowed for some values of one argument: its low 32 bits, masked, are one of `values`."""

    numbers: tuple[int, int]
    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    is_pointer: bool = False
    """The high 32 bits must be 0 too; of an `int` the kernel reads the low ones only."""


def architecture() -> Architecture | None:
    """This machine's; None where no table is known."""
    return ARCHITECTURES.get(platform.machine())


def filter_program(pid: int, is_private_tree: bool, may_thread: bool) -> bytes:
    """The filter of a process with this pid, as an array of `struct sock_filter`.

    Args:
        is_private_tree: the process has a mount namespace of its own, whose files are read-only or its own.
        may_thread: the number of its threads has a limit (RLIMIT_NPROC).
    """
    machine = architecture()
    assert machine is not None
    column = machine.column
    allowed = {numbers[column] for numbers in (*_BOTH.values(), *_ALSO.values())}
    if is_private_tree:
        allowed |= {numbers[column] for numbers in IN_A_PRIVATE_TREE.values()}
    if column == 0:
        allowed |= {*_X86_64_ALONE.values(), *(_X86_64_IN_A_PRIVATE_TREE.values() if is_private_tree else ())}
    program = [_LOAD, 0, 0, 4, _EQUAL, 1, 0, machine.audit, _RETURN, 0, 0, _KILL, _LOAD, 0, 0, 0]
    for number in sorted(allowed):
        program += [_EQUAL, 0, 1, number, _RETURN, 0, 0, _ALLOW]
    program += [_EQUAL, 0, 1, _CLONE3[column], _RETURN, 0, 0, _ERRNO | _ENOSYS]  # the C library then uses clone
    if may_thread:
        program += _unless(
            _CLONE[column],
            [_LOAD, 0, 0, _ARGUMENTS_AT, _HAS_ANY, 2, 0, _NAMESPACES, _HAS_ANY, 0, 1, _THREAD, _RETURN, 0, 0, _ALLOW],
        )
    for rule in _rules(pid):
        where = _ARGUMENTS_AT + 8 * rule.argument
        body = [_LOAD, 0, 0, where + 4, _EQUAL, 1, 0, 0, _RETURN, 0, 0, _ERRNO | _EPERM] if rule.is_pointer else []
        body += [_LOAD, 0, 0, where, _AND, 0, 0, rule.mask]
        for value in rule.values:
            body += [_EQUAL, 0, 1, value, _RETURN, 0, 0, _ALLOW]
        program += _unless(rule.numbers[column], body)
    program += [_RETURN, 0, 0, _ERRNO | _EPERM]
    return struct.pack("=" + "HBBI" * (len(program) // 4), *program)


def _unless(number: int, body: list[int]) -> list[int]:
    """`body` for the call `number`, then a refusal."""
    body = [*body, _RETURN, 0, 0, _ERRNO | _EPERM]
    return [_EQUAL, 0, len(body) // 4, number, *body]


def _rules(pid: int) -> list[Rule]:
    return [
        Rule((62, 129), 0, (pid,)),  # kill
        Rule((234, 131), 0, (pid,)),  # tgkill: abort and raise
        Rule((302, 261), 0, (0, pid)),  # prlimit64: its own limits, which only go down
        Rule((160, 164), 0, tuple(range(16))),  # setrlimit
        Rule((16, 29), 1, (0x5401, 0x5413, 0x5421, 0x5450, 0x5451, 0x541B)),  # ioctl: TCGETS, TIOCGWINSZ, FIO*
        Rule((72, 25), 1, (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032, 1033, 1034, 36, 37, 38)),  # fcntl: no owner, no signal
        Rule((157, 167), 0, (15, 16, 3, 21, 0x53564D41)),  # prctl: names, and what reads
        # AF_UNIX streams that begin and end here: asyncio wakes itself over one. Without an address (NULL) no
        # message leaves them.
        Rule((53, 199), 1, (1,), mask=0xF),  # socketpair: SOCK_STREAM
        Rule((44, 206), 4, (0,), is_pointer=True),  # sendto
    ]

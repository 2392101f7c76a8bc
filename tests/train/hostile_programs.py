# ruff: noqa: E501
"""Programs that try to get out of the sandbox, each at one harmless thing that a test put there for it.

Placeholders: OUTSIDE a folder that is not the program's, SCRATCH one to work in where there is no own folder, PORT of a
loopback listener, VICTIM and TESTER pids, LIBRARY a shared object's bytes in hexadecimal that writes OUTSIDE/native.
"""

from __future__ import annotations

SYSCALL = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ncall = libc.syscall\n"
SUCCEEDS = "\nif result >= 0: print('ESCAPED')"

READS = {
    "open": "print(open('OUTSIDE/secret').read())",
    "os.open": "import os\nprint(os.read(os.open('OUTSIDE/secret', os.O_RDONLY), 99))",
    "pathlib": "import pathlib\nprint(pathlib.Path('OUTSIDE/secret').read_text())",
    "path of bytes": "print(open(b'OUTSIDE/secret', 'rb').read())",
    "linecache": "import linecache\nprint(linecache.getlines('OUTSIDE/secret'))",
    "symbolic link": "import os\nos.symlink('OUTSIDE/secret', 'link')\nprint(open('link').read())",
    "hard link": "import os\nos.link('OUTSIDE/secret', 'hard')\nprint(open('hard').read())",
    "descriptor of a folder": "import os\nfolder = os.open('OUTSIDE', os.O_PATH)\n"
    "print(os.read(os.open('secret', os.O_RDONLY, dir_fd=folder), 99))",
    "dots": "import os\nprint(open('../' * 30 + 'OUTSIDE/secret').read())",
    "mmap": "import mmap\nwith open('OUTSIDE/secret') as f: print(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[:])",
    "import": "import sys\nsys.path.insert(0, 'OUTSIDE')\nimport module\nprint(module.SECRET)",
    "source loader": "import importlib.machinery\n"
    "print(importlib.machinery.SourceFileLoader('m', 'OUTSIDE/module.py').load_module().SECRET)",
    "runpy": "import runpy\nprint(runpy.run_path('OUTSIDE/module.py')['SECRET'])",
    "fileinput": "import fileinput\nprint(list(fileinput.input('OUTSIDE/secret')))",
    "configuration": "import configparser\nc = configparser.ConfigParser()\nc.read('OUTSIDE/settings')\nprint(c['a']['b'])",
    "sqlite": "import sqlite3\nprint(sqlite3.connect('OUTSIDE/base').execute('select * from a').fetchall())",
    "numpy.fromfile": "import numpy\nprint(numpy.fromfile('OUTSIDE/secret', 'u1').tobytes())",
    "numpy.memmap": "import numpy\nprint(numpy.memmap('OUTSIDE/secret', 'u1', 'r').tobytes())",
    "safetensors": "import safetensors\nprint(safetensors.safe_open('OUTSIDE/tensors', 'np').metadata())",
    "libc": SYSCALL + "b = ctypes.create_string_buffer(99)\nf = libc.open(b'OUTSIDE/secret', 0)\nlibc.read(f, b, 99)\nprint(b.raw)",
    "openat2": SYSCALL + "how = ctypes.create_string_buffer(24)\nf = call(437, -100, b'OUTSIDE/secret', how, 24)\n"
    "print(os.read(f, 99))",
    "file handle": SYSCALL + "h = ctypes.create_string_buffer(b'\\x80\\0\\0\\0' + bytes(200))\nm = ctypes.c_int()\n"
    "libc.name_to_handle_at(-100, b'OUTSIDE/secret', h, ctypes.byref(m), 0)\n"
    "print(os.read(libc.open_by_handle_at(os.open('OUTSIDE', 0), h, 0), 99))",
    "sendfile": "import os\nos.sendfile(1, os.open('OUTSIDE/secret', os.O_RDONLY), 0, 99)",
    "listing": "import os\nprint(os.listdir('OUTSIDE/names'))",
    "glob": "import glob\nprint(glob.glob('OUTSIDE/names/*'))",
    "link's target": "import os\nprint(os.readlink('OUTSIDE/points'))",
    "attribute": "import os\nprint(os.getxattr('OUTSIDE/secret', 'user.secret'))",
    "proc root": "print(open('/proc/self/rootOUTSIDE/secret').read())",
    "proc of the tester": "print(open('/proc/TESTER/rootOUTSIDE/secret').read())",
    "environment of the tester": "if open('/proc/TESTER/environ', 'rb').read(): print('ESCAPED')",
    "memory of the victim": "memory = open('/proc/VICTIM/maps').read()\nif memory: print('ESCAPED')",
    "frames": "import sys\nframe = sys._getframe()\nwhile frame.f_back: frame = frame.f_back\n"
    "print(frame.f_builtins['open']('OUTSIDE/secret').read())",
}  # fmt: skip

WRITES = {
    "open": "open('OUTSIDE/new', 'w').write('x')",
    "append": "open('OUTSIDE/secret', 'a').write('x')",
    "os.open": "import os\nos.open('OUTSIDE/new', os.O_WRONLY | os.O_CREAT)",
    "folder": "import os\nos.mkdir('OUTSIDE/new')",
    "rename": "import os\nopen('own', 'w')\nos.rename('own', 'OUTSIDE/new')",
    "move": "import shutil\nopen('own', 'w')\nshutil.move('own', 'OUTSIDE/new')",
    "remove": "import os\nos.remove('OUTSIDE/secret')",
    "remove a tree": "import shutil\nshutil.rmtree('OUTSIDE/names')",
    "truncate": "import os\nos.truncate('OUTSIDE/secret', 0)",
    "hard link": "import os\nopen('own', 'w')\nos.link('own', 'OUTSIDE/new')",
    "symbolic link": "import os\nos.symlink('a', 'OUTSIDE/new')",
    "through a link": "import os\nos.symlink('OUTSIDE', 'door')\nopen('door/new', 'w')",
    "mode": "import os\nos.chmod('OUTSIDE/secret', 0o600)",
    "times": "import os\nos.utime('OUTSIDE/secret', (1, 1))",
    "owner": "import os\nos.chown('OUTSIDE/secret', 1234, 1234)",
    "attribute": "import os\nos.setxattr('OUTSIDE/secret', 'user.b', b'b')",
    "fifo": "import os\nos.mkfifo('OUTSIDE/new')",
    "node": "import os\nos.mknod('OUTSIDE/new')",
    "socket": "import socket\nsocket.socket(socket.AF_UNIX).bind('OUTSIDE/new')",
    "sqlite": "import sqlite3\nsqlite3.connect('OUTSIDE/new').execute('create table a(b)')",
    "dbm": "import dbm.dumb\ndbm.dumb.open('OUTSIDE/new', 'n')['a'] = 'b'",
    "logging": "import logging\nlogging.FileHandler('OUTSIDE/new')",
    "numpy": "import numpy\nnumpy.zeros(9).tofile('OUTSIDE/new')",
    "safetensors": "import numpy, safetensors.numpy\nsafetensors.numpy.save_file({'a': numpy.zeros(9)}, 'OUTSIDE/new')",
    "libc": SYSCALL + "libc.creat(b'OUTSIDE/new', 0o644)",
    "native extension": "import ctypes, os\nos.environ['TARGET'] = 'OUTSIDE/new'\nopen('native.so', 'wb').write(bytes.fromhex('LIBRARY'))\nctypes.CDLL('./native.so')",
    "thread": "import threading\nt = threading.Thread(target=open, args=('OUTSIDE/new', 'w'))\nt.start(); t.join()",
    "at exit": "import atexit\natexit.register(open, 'OUTSIDE/new', 'w')",
    "signal handler": "import signal, time\nsignal.signal(signal.SIGALRM, lambda *a: open('OUTSIDE/new', 'w'))\n"
    "signal.setitimer(signal.ITIMER_REAL, .01)\ntime.sleep(.05)",
}  # fmt: skip

REACHES = {
    "connection": "import socket\nsocket.create_connection(('127.0.0.1', PORT))",
    "urllib": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:PORT', timeout=.2)",
    "asyncio": "import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', PORT))",
    "libc": SYSCALL + "import struct, socket\ns = libc.socket(2, 1, 0)\n"
    "a = struct.pack('=H', 2) + struct.pack('!HI', PORT, 0x7f000001) + bytes(8)\nlibc.connect(s, a, 16)",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('OUTSIDE/listens')",
    "abstract socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\x00ABSTRACT')",
    "pair with an address": "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "a.sendto(b'x', 'OUTSIDE/datagrams')",
    "datagram": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
}  # fmt: skip

PRINTS = {
    "fork": "import os\npid = os.fork()\nif pid == 0: os._exit(0)\nos.wait()\nprint('ESCAPED')",
    "fork bomb": "import os\nfor _ in range(20):\n    if os.fork() == 0: os._exit(0)\nprint('ESCAPED')",
    "vfork": SYSCALL + "result = call(57)\nif result == 0: os._exit(0)" + SUCCEEDS,
    "clone3": SYSCALL + "a = ctypes.create_string_buffer(88)\na[32] = 17\nresult = call(435, a, 88)\n"
    "if result == 0: os._exit(0)" + SUCCEEDS,
    "subprocess": "import subprocess\nprint(subprocess.run(['echo', 'ESCAPED'], capture_output=True).stdout)",
    "system": "import os\nos.system('echo ESCAPED')",
    "spawn": "import os\nos.waitpid(os.posix_spawn('/bin/echo', ['echo', 'ESCAPED'], {}), 0)",
    "exec": "import os\nos.execv('/bin/echo', ['echo', 'ESCAPED'])",
    "exec of a descriptor": "import os\nos.execve(os.open('/bin/echo', os.O_RDONLY), ['echo', 'ESCAPED'], {})",
    "multiprocessing": "import multiprocessing as m\np = m.get_context('fork').Process(target=print, args=('ESCAPED',))\n"
    "p.start()\np.join()",
    "pseudo terminal": "import pty, os\npid, fd = pty.fork()\nif pid == 0: os._exit(0)\nprint('ESCAPED')",
    "own session": "import os\nos.setsid()\nprint('ESCAPED')",
    "signal 0 to the victim": "import os\nos.kill(VICTIM, 0)\nprint('ESCAPED')",
    "signal 0 to the parent": "import os\nos.kill(os.getppid(), 0)\nprint('ESCAPED')",
    "signal to its group": "import os\nos.killpg(VICTIM, 0)\nprint('ESCAPED')",
    "pidfd": "import os\nos.pidfd_open(VICTIM)\nprint('ESCAPED')",
    "thread's signal": SYSCALL + "result = call(200, VICTIM, 0)" + SUCCEEDS,
    "queued signal": SYSCALL + "i = ctypes.create_string_buffer(bytes(8) + b'\\xff' * 4, 128)\nresult = call(129, VICTIM, 0, i)" + SUCCEEDS,
    "priority": "import os\nos.setpriority(os.PRIO_PROCESS, VICTIM, 5)\nprint('ESCAPED')",
    "affinity": "import os\nos.sched_setaffinity(VICTIM, {0})\nprint('ESCAPED')",
    "limits": "import resource\nresource.prlimit(VICTIM, resource.RLIMIT_CORE, (0, 0))\nprint('ESCAPED')",
    "ptrace": SYSCALL + "result = call(101, 16, VICTIM, 0, 0)" + SUCCEEDS,
    "process_vm_readv": SYSCALL + "result = call(310, VICTIM, None, 0, None, 0, 0)" + SUCCEEDS,
    "namespaces": SYSCALL + "result = libc.unshare(0x10000000)" + SUCCEEDS,
    "mount": SYSCALL + "libc.unshare(0x20000)\nresult = libc.mount(b'tmpfs', b'OUTSIDE/names', b'tmpfs', 0, None)" + SUCCEEDS,
    "chroot": "import os\nos.chroot('OUTSIDE')\nprint('ESCAPED')",
    "user": "import os\nos.setresuid(1234, 1234, 1234)\nprint('ESCAPED')",
    "keys": SYSCALL + "result = call(248, b'user', b'a', b'b', 1, -3)" + SUCCEEDS,
    "bpf": SYSCALL + "result = call(321, 0, (ctypes.c_uint * 4)(1, 4, 4, 1), 16)" + SUCCEEDS,
    "perf": SYSCALL + "a = ctypes.create_string_buffer(b'\\1\\0\\0\\0\\x70\\0\\0\\0', 112)\nresult = call(298, a, 0, -1, -1, 0)"
    + SUCCEEDS,
    "userfaultfd": SYSCALL + "result = call(323, 0)" + SUCCEEDS,
    "memory file": "import os\nos.memfd_create('a')\nprint('ESCAPED')",
    "shared memory": SYSCALL + "result = libc.shmget(0, 4096, 0o600)\nlibc.shmctl(result, 0, None)" + SUCCEEDS,
    "message queue": SYSCALL + "result = libc.msgget(0, 0o600)\nlibc.msgctl(result, 0, None)" + SUCCEEDS,
    "named memory": "from multiprocessing import shared_memory as s\nm = s.SharedMemory(create=True, size=9)\nm.unlink()\n"
    "print('ESCAPED')",
    "personality": SYSCALL + "result = call(135, 0x40000)" + SUCCEEDS,
    "listener": "import socket\nsocket.create_server(('127.0.0.1', 0))\nprint('ESCAPED')",
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nprint('ESCAPED')",
    "io_uring": SYSCALL + "p = ctypes.create_string_buffer(120)\nresult = call(425, 4, p)" + SUCCEEDS,
    "tests of the package": "if open('TASKS/data/code.jsonl').read(): print('ESCAPED')",
}  # fmt: skip

EXHAUSTS = {
    "memory": "block = bytearray(1500 * 2**20)\nprint('ESCAPED')",
    "mapped memory": "import mmap\nblock = mmap.mmap(-1, 1500 * 2**20)\nprint('ESCAPED')",
    "raised limit": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))\nblock = bytearray(1500 * 2**20)\n"
    "print('ESCAPED')",
    "threads": "import threading, time\nthreading.stack_size(2**15)\n"
    "for _ in range(300): threading.Thread(target=time.sleep, args=(1,), daemon=True).start()\nprint('ESCAPED')",
    "large file": "import os\nf = os.open('large', os.O_WRONLY | os.O_CREAT)\nos.pwrite(f, b'x', 10**7)\nprint('ESCAPED')",
    "output": "print('x' * 10**6, 'ESCAPED')",
    "small files": "for n in range(1500): open(f'small{n}', 'w').write('x')\nprint('ESCAPED')",
    "many files": "for n in range(300): open(f'many{n}', 'wb').write(bytes(65000))\nfor n in range(300): "
    "assert len(open(f'many{n}', 'rb').read()) == 65000\nprint('ESCAPED')",
    "folders": "import os\nfor n in range(1500): os.mkdir(f'folder{n}')\nprint('ESCAPED')",
    "time": "import time\nwhile time.process_time() < 0.8: pass\nprint('ESCAPED', flush=True)",
    "time without signals": "import signal, time\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\n"
    "while time.process_time() < 0.8: pass\nprint('ESCAPED', flush=True)",
    "sleep": "import time\ntime.sleep(1.3)\nprint('ESCAPED')",
    "at exit": "import atexit, time\natexit.register(lambda: (time.sleep(1.3), print('ESCAPED')))",
    "thread that stays": "import threading, time\n"
    "threading.Thread(target=lambda: (time.sleep(1.3), print('ESCAPED'))).start()",
}  # fmt: skip

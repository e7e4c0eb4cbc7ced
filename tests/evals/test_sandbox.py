import ctypes
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import Any

import psutil
import pytest

from evals import confinement, sandbox
from evals.sandbox import Program, Verdict, decode, encode, run_programs
from proxytune.errors import UserError

try:
    import pyseccomp
except RuntimeError:  # libseccomp is missing
    pyseccomp = None

needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None or pyseccomp is None, reason="bubblewrap or libseccomp is not installed: no program can be run"
)

ADD = "def f(a, b):\n    return a + b\n"
WRONG = "def f(a, b):\n    return 5\n"
ADD_TEST = "assert f(2, 3) == 5\nassert f(2, 4) == 6"

FORGED = {
    "sys_exit": "import sys\nsys.exit(0)",
    "system_exit_in_the_call": "def f(a, b):\n    raise SystemExit(0)",
    "os_exit": "import os\ndef f(a, b):\n    os._exit(0)",
    "always_equal": "class Equal(int):\n    def __eq__(self, other): return True\n    __ne__ = None\ndef f(a, b): return Equal(0)",
    "stack_walk": (
        "import sys\ndef f(a, b):\n    frame = sys._getframe()\n    while frame:\n        for held in frame.f_locals.values():\n"
        "            if isinstance(held, list): held.append('passed')\n            if isinstance(held, dict): held['passed'] = True\n"
        "        frame = frame.f_back\n    return 5"
    ),
    "patched_assert": (
        "import builtins, unittest\nclass Quiet(BaseException): pass\nbuiltins.AssertionError = Quiet\n"
        "unittest.TestCase.assertEqual = lambda *given: None\n" + WRONG
    ),
    "atexit": "import atexit, os\natexit.register(lambda: (print('passed', flush=True), os._exit(0)))\n" + WRONG,
    "fake_token": (
        "import gc, os, re\ndef f(a, b):\n    found = re.findall('[0-9a-f]{32}', str(gc.get_objects())) or ['0' * 32]\n"
        "    for end in range(32):\n        for word in (*found, 'passed'):\n            try: os.write(end, word.encode())\n"
        "            except OSError: pass\n    return 5"
    ),
}

FILES = {
    "a_secret": "open(SECRET).close()",
    "the_users": "open('/etc/passwd').read()",
    "the_home": "os.listdir(HOME)",
    "the_checkout": "os.listdir(CHECKOUT)",
    "through_a_link": "os.symlink('/etc/passwd', '/tmp/link')\nopen('/tmp/link').read()",
    "write_beside_python": "open('/python/written', 'w').close()",
    "write_at_the_top": "open('/written', 'w').close()",
    "change_the_library": "open(os.__file__, 'a').close()",
}

NETWORK = {
    "localhost": "socket.create_connection(('127.0.0.1', PORT), timeout=1).close()",
    "abstract_socket": "with socket.socket(socket.AF_UNIX) as end:\n    end.connect(chr(0) + NAME)",
    "metadata_address": "socket.create_connection(('169.254.169.254', 80), timeout=1)",
    "datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'1', ('192.0.2.1', 53))",
    "a_name": "socket.getaddrinfo('example.com', 80)",
    "raw_packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "virtual_machines_host": "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "kernel_messages": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
}

DAEMON = "if os.fork() == 0:\n    os.setsid()\n    while True: time.sleep(1)"
PROCESSES = {
    "fork_bomb": ("while True: os.fork()", 1, "refused"),
    "thread_bomb": ("held = [threading.Thread(target=time.sleep, args=(60,)) for _ in range(9)]\n[thread.start() for thread in held]", 1, "failed"),
    "daemon": (DAEMON + "\nwhile True: time.sleep(1)", 2, "timed out"),
    "trace_all": (
        "libc = ctypes.CDLL(None, use_errno=True)\nfor other in range(1, 300):\n    if other != os.getpid():\n"
        "        if libc.ptrace(16, other, None, None) == 0 and other > 1: return 'traced'\nraise PermissionError",
        1,
        "refused",
    ),
    "trace_the_first": (
        "libc = ctypes.CDLL(None, use_errno=True)\nfor other in range(1, 5):\n    if other != os.getpid():\n"
        "        if libc.ptrace(16, other, None, None) == 0: return 'traced'\nraise PermissionError",
        1,
        "refused",
    ),
    "limits_of_the_first": ("import resource\nif resource.prlimit(1, resource.RLIMIT_AS)[0] == 2 ** 29: raise PermissionError", 1, "refused"),
    "outlive_the_parent": ("ctypes.CDLL(None).prctl(1, 0)\nwhile True: time.sleep(1)", 1, "timed out"),
    "kill_all": ("for number in (9, 15):\n    os.kill(-1, number)\n    os.kill(1, number)\nos.kill(HOST, 9)", 1, "refused"),
    "kill_the_host": ("os.kill(HOST, 9)", 1, "refused"),
}

RESOURCES = {
    "memory": ("held = []\nwhile True: held.append(bytearray(2 ** 20))", {"out of memory"}),
    "memory_at_once": ("bytearray(2 ** 33)", {"out of memory"}),
    "processor": ("while True: pass", {"timed out"}),
    "disk": ("for number in range(64): open(f'/tmp/{number}', 'wb').write(bytes(2 ** 20))", {"refused"}),
    "one_file": ("open('/tmp/file', 'wb').truncate(2 ** 30)", {"refused"}),
    "output": ("for _ in range(1024): print('x' * 2 ** 20)", {"too much output"}),
    "recursion": ("sys.setrecursionlimit(10 ** 9)\ndef deep(n): return [deep(n + 1)]\ndeep(0)", {"out of memory", "failed", "timed out"}),
    "huge_number": ("return 10 ** 10 ** 9", {"out of memory", "timed out"}),
}

# Memory that no process maps. The second form takes less.
UNMAPPED = {
    "memory_files": "for _ in range({}): os.write(os.memfd_create('held'), bytes(2 ** 24))",
    "system_v": (
        "libc = ctypes.CDLL(None, use_errno=True)\nlibc.shmat.restype = ctypes.c_void_p\nfor _ in range({}):\n"
        "    held = libc.shmget(0, 2 ** 24, 0o1600)\n    if held < 0: raise PermissionError\n    place = libc.shmat(held, None, 0)\n"
        "    ctypes.memset(place, 1, 2 ** 24)\n    libc.shmdt(ctypes.c_void_p(place))"
    ),
    "waiting_connections": (
        "with socket.socket(socket.AF_UNIX) as server:\n    server.bind(chr(0) + 'waiting')\n    server.listen(4096)\n    for _ in range({} * 100):\n"
        "        with socket.socket(socket.AF_UNIX) as end:\n            end.connect(chr(0) + 'waiting')\n            end.setblocking(False)\n"
        "            end.send(bytes(160_000))"
    ),
    "attributes": "open('/tmp/f', 'w').close()\nfor number in range({} * 200): os.setxattr('/tmp/f', f'user.{{number}}', bytes(2 ** 16))",
}
RECORDS = {
    "empty_files": "for number in range({}): os.close(os.open(f'/tmp/{{number}}', os.O_CREAT | os.O_WRONLY))\ntime.sleep(0.5)",
    "page_tables": (
        "libc = ctypes.CDLL(None, use_errno=True)\nlibc.mmap.restype, libc.mmap.argtypes = ctypes.c_size_t, [ctypes.c_size_t] * 6\n"
        "for number in range({}): ctypes.string_at(libc.mmap(2 ** 36 + number * 2 ** 30, 4096, 1, 0x22, 2 ** 32 - 1, 0), 1)\ntime.sleep(0.5)"
    ),
}
RECORDS["page_tables_of_a_child"] = f"if os.fork(): time.sleep(1)\nelse:\n{indent(RECORDS['page_tables'], '    ')}\n    os._exit(0)"
TWO_PROCESSES = (
    "end, other = os.pipe()\ntry:\n    child = os.fork()\n    held = bytearray(b'1') * (80 * 2 ** 20)\n    if child == 0: os.write(other, b'1')\n"
    "finally:\n    if child == 0: os._exit(0)\nos.close(other)\nif not os.read(end, 1): raise MemoryError"
)
REFUSED = """
ptrace process_vm_readv process_vm_writev keyctl add_key request_key memfd_create memfd_secret shmget semget msgget vmsplice io_uring_setup
io_uring_enter io_uring_register userfaultfd perf_event_open bpf mount umount2 fsopen fsmount open_tree move_mount mount_setattr pivot_root
chroot unshare setns clone3 prctl inotify_init1 fanotify_init name_to_handle_at open_by_handle_at pidfd_getfd process_madvise personality
kcmp seccomp timer_create mq_open swapon quotactl init_module kexec_load mlock mbind remap_file_pages
""".split()
FIND_KEY = (
    "def call(*given):\n    said = ctypes.CDLL(None, use_errno=True).syscall(*map(ctypes.c_long, given[:3]), *given[3:])\n"
    "    if said < 0: raise PermissionError\n    return said\n"
    "key = call(KEYCTL, 10, -3, b'user', NAME, 0)\nheld = ctypes.create_string_buffer(8)\n"
    "call(KEYCTL, 11, key, held, 8)\nassert held.value == b'secret'"
)

SECRETS = {
    "variables": "return 'told' if os.environ else 'refused'",
    "c_variables": "get = ctypes.CDLL(None).getenv\nget.restype = ctypes.c_char_p\nreturn 'told' if get(b'API_TOKEN') else 'refused'",
    "own_proc": "open('/proc/self/environ').close()",
    "host_proc": "open(f'/proc/{HOST}/environ').close()",
}

HONEST = {
    "plain": (ADD, ADD_TEST),
    "floats": ("def f(x): return [x / 3, float('nan'), float('inf')]", "a, b, c = f(1.0)\nassert a == 1 / 3 and b != b and c > 1e308"),
    "containers": (
        "def f(x): return {(1, 'a'): {2, 3}, None: [True, b'x', 2j, frozenset()]}",
        "assert f(0) == {(1, 'a'): {2, 3}, None: [True, b'x', 2j, frozenset()]}",
    ),
    "error": ("def f(x):\n    raise KeyError(x)", "try:\n    f('a')\nexcept KeyError as error:\n    assert error.args\nelse:\n    assert False"),
    "iterators": ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2] and f(3) != [0, 1, 2]"),
    "own_class": (
        "class Node:\n    def __init__(self, value): self.value, self.next = value, None\n"
        "def f(node): return node.value + (f(node.next) if node.next else 0)",
        "node = Node(1)\nnode.next = Node(value=2)\nassert f(node) == 3",
    ),
    "library": (
        "import collections, dataclasses, heapq, itertools, math, re, typing\n@dataclasses.dataclass\nclass Pair:\n    a: int\n"
        "def f(x: typing.List[int]): return collections.Counter(heapq.nsmallest(2, itertools.chain(x, [Pair(1).a])))",
        "assert f([3, 1, 2]) == {1: 2}",
    ),
    "big_number": ("import math\ndef f(n): return math.factorial(n)", "import math\nassert f(3000) == math.factorial(3000)"),
    "prints": ("def f(a, b):\n    print('passed', a, b)\n    return a + b", ADD_TEST),
    "thread": (
        "import concurrent.futures\ndef f(x):\n    with concurrent.futures.ThreadPoolExecutor(1) as pool:\n        return list(pool.map(abs, x))",
        "assert f([-1, 2]) == [1, 2]",
    ),
    "threads_in_turn": (
        "import threading\ndef f(x):\n    held = []\n    for n in x:\n        one = threading.Thread(target=held.append, args=(n,))\n"
        "        one.start()\n        one.join()\n    return held",
        "assert f([*range(50)]) == [*range(50)]",
    ),
    "event_loop": (
        "import asyncio\nasync def add(a, b):\n    await asyncio.sleep(0.01)\n    return a + b\ndef f(a, b): return asyncio.run(add(a, b))",
        ADD_TEST,
    ),
    "copies_of_files": (
        "import os, shutil, tempfile\ndef f(text):\n    with tempfile.TemporaryDirectory() as folder:\n        os.makedirs(f'{folder}/a/b')\n"
        "        with open(f'{folder}/a/b/c', 'w') as file: file.write(text)\n        shutil.copytree(f'{folder}/a', f'{folder}/d')\n"
        "        shutil.copy2(f'{folder}/d/b/c', f'{folder}/e')\n        os.rename(f'{folder}/e', f'{folder}/f')\n"
        "        return open(f'{folder}/f').read()",
        "assert f('text') == 'text'",
    ),
    "local_sockets": (
        "import select, socket\ndef f(text):\n    one, other = socket.socketpair()\n    one.sendall(text)\n    select.select([other], [], [], 1)\n"
        "    return other.recv(9)",
        "assert f(b'text') == b'text'",
    ),
    "alarm": (
        "import signal, time\ndef f():\n    def raised(number, frame): raise TimeoutError\n    signal.signal(signal.SIGALRM, raised)\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.05)\n    try: time.sleep(5)\n    except TimeoutError: return 'late'",
        "assert f() == 'late'",
    ),
    "much_memory": ("def f(n): return len(bytearray(b'1') * n)", "assert f(400 * 2 ** 20) == 400 * 2 ** 20"),
    "memory_map": (
        "import mmap\ndef f():\n    with mmap.mmap(-1, 4096) as held:\n        held[:4] = b'text'\n        return held[:4]",
        "assert f() == b'text'",
    ),
    "builtin_name": ("def sum(a, b=1):\n    return a * b", "assert sum(2, b=3) == 6 and len(str(sum(2))) == 1", "sum"),
}

NEARLY = {
    "last_test": ("def f(a, b): return 5 if b == 3 else 7", ADD_TEST),
    "text_for_number": ("def f(a, b): return str(a + b)", ADD_TEST),
    "nothing": ("def f(a, b): a + b", ADD_TEST),
    "tuple_for_list": ("def f(x): return tuple(x)", "assert f([1]) == [1]"),
    "iterator_for_list": ("def f(x): return map(int, x)", "assert f(['1']) == [1]"),
    "float_error": ("def f(x): return x * 3", "assert f(0.1) == 0.3"),
    "other_name": ("def g(a, b): return a + b", ADD_TEST),
    "syntax": ("def f(a, b) return a + b", ADD_TEST),
    "raises": ("def f(a, b): return a + b if b < 4 else 1 / 0", ADD_TEST),
    "own_helper": ("def poly(x): return 0\ndef f(x): return 0.0", "assert poly(f(0)) == 0"),
}


def cases(table: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


def attempt(body: str, **names: object) -> str:
    """A solution that tells whether the system refused `body`; any other error is one of the attack itself and fails."""
    head = "import ctypes, os, socket, sys, threading, time\n" + "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return f"{head}def f():\n    try:\n{indent(body, ' ' * 8)}\n    except OSError:\n        return 'refused'\n    return 'reached'\n"


def verdict(solution: str, test: str = "assert f() == 'refused'", entry_point: str = "f", setup: str = "", **options: Any) -> Verdict:
    return run_programs([Program(solution, test, entry_point, setup)], **options)[0]


def outcome(solution: str, **options: Any) -> str:
    reason = verdict(solution, **options).reason
    return "refused" if reason == "passed" else reason


def in_this_process(solution: str) -> object:
    scope: dict[str, Any] = {}
    exec(solution, scope)
    return scope["f"]()


def sandboxed() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [str(path)] if b"harness.solve(" in path.read_bytes() else []
        except OSError:
            continue
    return found


def number(call: str) -> int:
    return int(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call))


@pytest.fixture
def unfiltered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandboxes without their filter of system calls."""
    with (tmp_path / "filter").open("wb") as file:
        pyseccomp.SyscallFilter(pyseccomp.ALLOW).export_bpf(file)
    run_programs([])  # the sandboxes are proven
    monkeypatch.setattr(sandbox, "FILTERS", [file.name] * 2)


@pytest.fixture
def host_key() -> Iterator[dict[str, object]]:
    libc, name = ctypes.CDLL(None), f"secret-{os.getpid()}".encode()
    key = libc.syscall(number("add_key"), b"user", name, b"secret", ctypes.c_long(6), ctypes.c_long(-3))
    if key < 0:
        pytest.skip("this system lets its users hold no keys")
    yield {"NAME": name, "KEYCTL": number("keyctl")}
    libc.syscall(number("keyctl"), ctypes.c_long(9), ctypes.c_long(key), ctypes.c_long(-3))


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # pytest's own folders are closed to the user that runs sandboxes
        yield Path(folder)


@pytest.fixture
def listeners() -> Iterator[dict[str, object]]:
    name = f"listener-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0" + name)
        local.listen()
        yield {"PORT": server.getsockname()[1], "NAME": name}


@needs_bubblewrap
@cases(FORGED)
def test_forged_verdict(case: str) -> None:
    assert not verdict(case, ADD_TEST, seconds=5.0).passed


@needs_bubblewrap
@cases(FILES)
def test_files_outside(case: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    solution = attempt(case, SECRET=str(tmp_path / "secret"), HOME=str(Path.home()), CHECKOUT=str(Path(__file__).parent))
    assert outcome(solution) == "refused"
    if "SECRET" in case or "HOME" in case or "CHECKOUT" in case:
        assert in_this_process(solution) == "reached"


@needs_bubblewrap
@cases(NETWORK)
def test_network(case: str, listeners: dict[str, object]) -> None:
    solution = attempt(case, **listeners)
    assert outcome(solution) == "refused"
    if "PORT" in case or "NAME" in case:
        assert in_this_process(solution) == "reached"


@needs_bubblewrap
@cases(PROCESSES)
def test_processes(case: tuple[str, int, str]) -> None:
    body, processes, expected = case
    assert outcome(attempt(body, HOST=os.getpid()), seconds=3.0, processes=processes) == expected
    deadline = time.monotonic() + 5
    while sandboxed() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not sandboxed()


@needs_bubblewrap
@cases(RESOURCES)
def test_resources(case: tuple[str, set[str]]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert outcome(attempt(case[0]), seconds=4.0, memory=2**28) in case[1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@needs_bubblewrap
@cases(UNMAPPED)
def test_memory_that_no_process_maps(case: str) -> None:
    assert outcome(attempt(case.format(12)), memory=2**27) == "refused"


@needs_bubblewrap
@pytest.mark.parametrize("case", ["memory_files", "system_v", "waiting_connections"])
def test_the_filter_is_what_refuses_memory(case: str, unfiltered: None) -> None:
    assert outcome(attempt(UNMAPPED[case].format(1)), memory=2**27) == "failed"  # 'reached'


@needs_bubblewrap
@cases(RECORDS)
def test_records_of_the_kernel_are_memory(case: str) -> None:
    assert outcome(attempt(case.format(60_000)), processes=2) == "out of memory"
    assert verdict(attempt(case.format(1_000)), "assert f() == 'reached'", processes=2).passed


@needs_bubblewrap
def test_memory_is_that_of_all_processes() -> None:
    assert outcome(attempt(TWO_PROCESSES), memory=2**27, processes=2) == "out of memory"
    assert verdict(attempt(TWO_PROCESSES), "assert f() == 'reached'", memory=2**29, processes=2).passed


@needs_bubblewrap
def test_one_process_or_several() -> None:
    solution = attempt("if os.fork() == 0: os._exit(0)\nos.wait()")
    assert outcome(solution) == "refused"
    assert verdict(solution, "assert f() == 'reached'", processes=2).passed


def refusals(names: list[str]) -> str:
    """A solution that gives the names of those calls that the sandbox's kernel has."""
    calls = {name: number(name) for name in names if number(name) >= 0}
    return (
        f"import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\nnone = [ctypes.c_long(-1)] * 6\ncalls = {calls}\n"
        "def had(number): return libc.syscall(number, *none) != -1 or ctypes.get_errno() != errno.ENOSYS\n"
        "def f(): return [name for name in calls if had(calls[name])]"
    )


@needs_bubblewrap
def test_calls_that_no_program_needs_are_refused() -> None:
    assert verdict(refusals(REFUSED), "assert f() == []").passed
    assert verdict(refusals(["read", "close", "getpid"]), "assert f() == ['read', 'close', 'getpid']").passed


@needs_bubblewrap
def test_the_filter_is_what_refuses_calls(unfiltered: None) -> None:
    calls = ["ptrace", "unshare", "prctl", "mount"]
    assert verdict(refusals(calls), f"assert f() == {calls}").passed


@needs_bubblewrap
@pytest.mark.skipif(platform.machine() != "x86_64", reason="this machine has one kind of calls")
def test_the_other_calls_of_a_machine_end_the_program() -> None:
    solution = (
        "import ctypes, mmap\ndef f(code):\n    page = mmap.mmap(-1, 4096, prot=7)\n    page.write(code)\n"
        "    return ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()"
    )
    native, of_32_bits = b"\xb8\x27\0\0\0\x0f\x05\xc3", b"\xb8\x14\0\0\0\xcd\x80\xc3"  # getpid
    assert verdict(solution, f"assert f({native!r}) > 0").passed
    assert not verdict(solution, f"assert f({of_32_bits!r}) > 0").passed


@needs_bubblewrap
def test_sandboxes_without_the_filter_are_refused(unfiltered: None) -> None:
    sandbox._prove_isolation.cache_clear()
    with pytest.raises(UserError, match="does not keep programs in"):
        run_programs([])


@needs_bubblewrap
def test_keys_of_the_host(host_key: dict[str, object]) -> None:
    solution = attempt(FIND_KEY, **host_key)
    assert outcome(solution) == "refused"
    assert in_this_process(solution) == "reached"


@needs_bubblewrap
def test_the_session_keyring_alone_keeps_keys(host_key: dict[str, object], unfiltered: None) -> None:
    assert outcome(attempt(FIND_KEY, **host_key)) == "refused"
    leave = f"import ctypes\nwords = b'user', b'left', b'secret', ctypes.c_long(6), ctypes.c_long(-3)\nadd = {number('add_key')}\n"
    leave += "added = ctypes.CDLL(None).syscall(add, *words)\ndef f(): return added > 0\n"
    look = attempt(FIND_KEY, **host_key | {"NAME": b"left"})
    assert verdict(leave, "assert f()").passed
    assert outcome(look) == "refused"
    assert verdict(leave + look, "assert f() == 'reached'").passed  # a program finds its own key


@needs_bubblewrap
@cases(SECRETS)
def test_secrets(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    solution = attempt(case, HOST=os.getpid())
    assert outcome(solution) == "refused"
    if "HOST" in case or "environ" in case:
        assert in_this_process(solution) in ("reached", "told")


@needs_bubblewrap
@cases(HONEST)
def test_honest_program(case: tuple[str, ...]) -> None:
    assert verdict(*case) == (True, "passed")


@needs_bubblewrap
@cases(NEARLY)
def test_nearly_right_program(case: tuple[str, str]) -> None:
    assert verdict(*case, setup="def poly(x): return x + 1") == (False, "failed")


@needs_bubblewrap
def test_tests_that_catch_everything_do_not_hide_an_early_end() -> None:
    assert not verdict("import os\ndef f(): os._exit(0)", "try:\n    f()\nexcept BaseException:\n    pass").passed


@needs_bubblewrap
def test_an_end_of_iteration_does_not_skip_the_tests() -> None:
    solution = "def f(x):\n    raise StopIteration"
    assert not verdict(solution, "for answer, wanted in zip(map(f, [1, 2]), [1, 2]):\n    assert answer == wanted").passed


@needs_bubblewrap
def test_a_solution_holds_its_two_pipes_and_no_more() -> None:
    solution = "import os, stat\ndef f():\n    held = []\n    for end in range(32):\n        try: held.append(stat.S_IFMT(os.fstat(end).st_mode))\n"
    solution += "        except OSError: pass\n    return held == [stat.S_IFIFO] * 5"
    assert verdict(solution, "assert f()").passed


@needs_bubblewrap
@pytest.mark.parametrize("said", ["{}", "[]", '["value", ["set", ["list"]]]', '["value", ["code", "x"]]', '["value", ' + "[" * 10**5, "nonsense"])
def test_answers_that_are_no_data(said: str) -> None:
    solution = (
        f"import os\ndef f():\n    for end in range(3, 32):\n        try: os.write(end, {said!r}.encode() + b'\\n')\n        except OSError: pass"
    )
    assert verdict(solution) == (False, "forged")


@needs_bubblewrap
def test_an_answer_without_end() -> None:
    assert verdict("def f(): return ['x' * 10 ** 6] * 10") == (False, "too much output")
    assert verdict("import itertools\ndef f(): return itertools.count()", seconds=2.0, memory=2**27).reason in ("out of memory", "timed out")


@needs_bubblewrap
def test_programs_share_no_file_and_keep_their_order() -> None:
    leave = Program("def f():\n    open('/tmp/left', 'w').close()", "f()", "f")
    look = Program("import os\ndef f(): return os.listdir('/tmp')", "assert f() == []", "f")
    done: list[int] = []
    verdicts = run_programs([leave, look, Program(WRONG, ADD_TEST, "f"), look], progress=done.append)
    assert [verdict.passed for verdict in verdicts] == [True, True, False, True]
    assert done == [1] * 4
    assert run_programs([]) == []


@needs_bubblewrap
def test_nothing_is_left_open() -> None:
    verdict(ADD, ADD_TEST)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    run_programs([Program(ADD, ADD_TEST, "f")] * 8)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


OPEN = """#!/bin/sh
while [ "$1" != --ro-bind ]; do shift; done
root=$2
while [ "$1" != /python/bin/python ]; do shift; done
shift
LD_LIBRARY_PATH=$root/lib exec "$root/python/bin/python" "$@"
"""


@pytest.mark.skipif(shutil.which("ldd") is None, reason="without ldd no Python can be made ready for a sandbox")
@pytest.mark.parametrize(
    ("script", "reason"), [(OPEN, "does not keep programs in"), ("#!/bin/sh\nexit 1\n", "starts no sandbox"), ("", "be started")]
)
def test_a_sandbox_that_is_none_is_refused(script: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bwrap").write_text(script)
        for path in (Path(folder), Path(folder) / "bwrap"):
            path.chmod(0o755)
        monkeypatch.setenv("PATH", folder, prepend=os.pathsep)
        sandbox._prove_isolation.cache_clear()
        with pytest.raises(UserError, match=reason):
            run_programs([Program(ADD, ADD_TEST, "f")])
    sandbox._prove_isolation.cache_clear()


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=re.escape("apt install bubblewrap")) as raised:
        run_programs([Program(ADD, ADD_TEST, "f")])
    assert "\n" not in str(raised.value)


@needs_bubblewrap
@pytest.mark.parametrize("module", [None, RuntimeError("Unable to find libseccomp")])
def test_without_the_filter_nothing_runs(module: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    confinement._library.cache_clear()
    if module is None:
        monkeypatch.setitem(sys.modules, "pyseccomp", None)
    else:
        (tmp_path / "pyseccomp.py").write_text(f"raise {module!r}")
        monkeypatch.delitem(sys.modules, "pyseccomp")
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="apt install libseccomp2") as raised:
        run_programs([Program(ADD, ADD_TEST, "f")])
    assert "\n" not in str(raised.value)


RUN = """import sys
from evals.sandbox import Program, run_programs
print(run_programs([Program(sys.argv[1], "f()", "f")])[0].reason)"""
HOLD = "import time\nfrom evals.confinement import new_folder\nheld = new_folder()\nprint(held.name, flush=True)\ntime.sleep(60)"


def started(folder: Path, *command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.Popen([sys.executable, "-c", *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_folders_of_killed_processes_are_removed(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(folder, HOLD) as killed, started(folder, HOLD) as alive:
        assert killed.stdout and alive.stdout
        left, held = Path(killed.stdout.readline().strip()), Path(alive.stdout.readline().strip())
        killed.send_signal(number)
        killed.wait()
        (folder / "kept").mkdir()
        (folder / "kept/file").touch()
        (folder / "proxytune-sandbox-link").symlink_to(folder / "kept")
        assert left.is_dir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with confinement.new_folder() as own:
            assert {path.name for path in folder.iterdir()} == {"kept", "proxytune-sandbox-link", held.name, Path(own).name}
        assert (folder / "kept/file").exists()
        alive.kill()


@needs_bubblewrap
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_nothing_that_the_next_does_not_remove(number: int, folder: Path) -> None:
    with started(folder, RUN, "import time\ndef f(): time.sleep(60)") as run:
        deadline = time.monotonic() + 20
        while not any("harness.solve(" in " ".join(child.cmdline()) for child in psutil.Process(run.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(number)
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert len(list(folder.iterdir())) == 1
    with started(folder, RUN, "def f(): pass") as run:
        assert run.stdout and run.stdout.read() == "passed\n"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "value", [None, True, -(10**50), 0.1, float("-inf"), 1j, "\ud800", b"\0", [(), {1}], {(1,): {"a": frozenset({2})}}, range(3)]
)
def test_data_survive(value: object) -> None:
    assert decode(encode(value, None), None) == value
    assert type(decode(encode(value, None), None)) is type(value)

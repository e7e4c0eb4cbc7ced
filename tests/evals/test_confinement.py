"""What a program cannot reach: files, networks, other processes, the machine's resources, secrets; and what keeps it in."""

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
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import Any

import psutil
import pytest
from helpers import cases, needs_bubblewrap, verdict

import proxytune
from evals import confinement, sandbox
from evals.sandbox import Program, run_programs
from proxytune.errors import UserError

try:
    import pyseccomp
except RuntimeError:  # libseccomp is missing
    pyseccomp = None

ADDS = Program("def f(a, b): return a + b", "assert f(2, 3) == 5", "f")

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


def attempt(body: str, **names: object) -> str:
    """A solution that tells whether the system refused `body`; any other error is one of the attack itself and fails."""
    head = "import ctypes, os, socket, sys, threading, time\n" + "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return f"{head}def f():\n    try:\n{indent(body, ' ' * 8)}\n    except OSError:\n        return 'refused'\n    return 'reached'\n"


def outcome(solution: str, **options: Any) -> str:
    reason = verdict(solution, **options).reason
    return "refused" if reason == "passed" else reason


def in_this_process(solution: str) -> object:
    scope: dict[str, Any] = {}
    exec(solution, scope)
    return scope["f"]()


def sandboxed() -> list[str]:
    """The processes in sandboxes, but for those of tests that another process of this run is at."""
    beside = {process.pid for process in psutil.Process(os.getppid()).children()} - {os.getpid()} if "PYTEST_XDIST_WORKER" in os.environ else set()
    found = []
    for process in psutil.process_iter():
        try:
            if "harness.solve(" in " ".join(process.cmdline()) and not beside & {parent.pid for parent in process.parents()}:
                found.append(str(process))
        except psutil.Error:
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
    seconds = 1.5 if expected == "timed out" else 3.0
    assert outcome(attempt(body, HOST=os.getpid()), seconds=seconds, processes=processes) == expected
    deadline = time.monotonic() + 5
    while sandboxed() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not sandboxed()


@needs_bubblewrap
@cases(RESOURCES)
def test_resources(case: tuple[str, set[str]]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = 1.5 if "timed out" in case[1] else 4.0
    assert outcome(attempt(case[0]), seconds=seconds, memory=2**28) in case[1]
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
            run_programs([ADDS])
    sandbox._prove_isolation.cache_clear()


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=re.escape("apt install bubblewrap")) as raised:
        run_programs([ADDS])
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
        run_programs([ADDS])
    assert "\n" not in str(raised.value)


RUN = """import sys
from evals.sandbox import Program, run_programs
print(run_programs([Program(sys.argv[1], "f()", "f")])[0].reason)"""
HOLD = f"""import sys, time, types
sys.modules["proxytune"] = package = types.ModuleType("proxytune")  # of which one small file is needed: without torch it is there at once
package.__path__ = {list(proxytune.__path__)!r}
from evals.confinement import new_folder
held = new_folder()
print(held.name, flush=True)
time.sleep(60)"""


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

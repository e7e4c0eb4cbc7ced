"""What confines the sandboxes beside bubblewrap: a filter of system calls, a session keyring, a count of what the kernel holds for a program, and a
folder that no killed run leaves for good."""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import socket
import tempfile
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

from proxytune.errors import UserError

PREFIX = "proxytune-sandbox-"
JOIN_SESSION_KEYRING = 1  # of keyctl
NAMESPACES = 0x7E020000  # the flags of clone that make one
THREAD = 0x00010000
THREAD_NAMES = (15, 16)  # of prctl
NAME = 2048  # bytes, about, of the record of a file, folder or link, an empty one too

# What a Python without packages needs. What is not here fails as a call that the kernel does not have: keys, tracing, mounts, namespaces, memory
# in no process and no file (memfd_create, shmget, vmsplice), sizes of buffers, io_uring, bpf and all that later kernels add.
ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek sendfile copy_file_range fadvise64 readahead ioctl
open openat creat close close_range dup dup2 dup3 pipe pipe2 flock fsync fdatasync sync_file_range truncate ftruncate fallocate
stat lstat fstat newfstatat statx statfs fstatfs access faccessat faccessat2 getdents getdents64 getcwd chdir fchdir
rename renameat renameat2 mkdir mkdirat rmdir link linkat unlink unlinkat symlink symlinkat readlink readlinkat mknod mknodat
chmod fchmod fchmodat fchmodat2 chown lchown fchown fchownat umask utime utimes utimensat futimesat getxattr lgetxattr fgetxattr listxattr
llistxattr flistxattr
mmap munmap mprotect mremap madvise brk msync mincore membarrier map_shadow_stack arch_prctl
execve execveat exit exit_group wait4 waitid getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups
getpgrp getpgid setpgid getsid setsid prlimit64 getrlimit setrlimit getrusage times sysinfo uname getpriority setpriority
set_tid_address set_robust_list get_robust_list rseq futex sched_yield sched_getaffinity sched_setaffinity sched_getparam
sched_getscheduler sched_get_priority_max sched_get_priority_min sched_rr_get_interval getcpu getrandom
kill tkill tgkill rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack pause alarm
setitimer getitimer restart_syscall clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time
timerfd_create timerfd_settime timerfd_gettime eventfd eventfd2
poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
sendto recvfrom sendmsg recvmsg shutdown getsockname getpeername getsockopt
""".split()
DESCRIPTORS = [getattr(fcntl, f"F_{name}") for name in "DUPFD DUPFD_CLOEXEC GETFD SETFD GETFL SETFL GETLK SETLK SETLKW GETOWN SETOWN".split()]
WITHOUT_ATTRIBUTES = "setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr".split()


@cache
def _library() -> ModuleType:
    """libseccomp, through pyseccomp. Raises `UserError` where one of them is missing."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"sandbox: programs run only under a filter of system calls, and libseccomp cannot be loaded ({error}); install it (pip install "
            "pyseccomp; Debian, Ubuntu: apt install libseccomp2), or leave out measures that run code"
        ) from error
    return pyseccomp


def write_filter(path: Path, several: bool) -> None:
    """Writes the filter of system calls to `path`, in the form that bubblewrap takes. Programs may start threads, and processes if `several`."""
    library = _library()
    rules = library.SyscallFilter(library.ERRNO(errno.ENOSYS))

    def add(action: int, call: str, *arguments: object) -> None:
        number = library.resolve_syscall(library.Arch.NATIVE, call)
        if number >= 0:  # else this library or this machine has no such call
            rules.add_rule(action, number, *arguments)

    def allow(call: str, place: int, value: int) -> None:
        add(library.ALLOW, call, library.Arg(place, library.EQ, value))

    for call in ALLOWED:
        add(library.ALLOW, call)
    for command in DESCRIPTORS:  # without the sizes of pipes, which are memory
        allow("fcntl", 1, command)
    for command in THREAD_NAMES:  # without the signal by which the sandbox ends with its parent
        allow("prctl", 0, command)
    # Sockets in pairs only: some families (AF_VSOCK) belong to no network namespace, and connections that nobody accepts hold any amount of memory.
    allow("socketpair", 0, socket.AF_UNIX)
    add(library.ERRNO(errno.EAFNOSUPPORT), "socket")
    for call in WITHOUT_ATTRIBUTES:  # as of a file system without them, which copies of files expect
        add(library.ERRNO(errno.ENOTSUP), call)
    if several:
        add(library.ALLOW, "clone", library.Arg(0, library.MASKED_EQ, NAMESPACES, 0))
    else:
        add(library.ALLOW, "clone", library.Arg(0, library.MASKED_EQ, NAMESPACES | THREAD, THREAD))
        add(library.ERRNO(errno.EAGAIN), "clone", library.Arg(0, library.MASKED_EQ, THREAD, 0))
    for call in ("fork", "vfork"):
        add(library.ALLOW if several else library.ERRNO(errno.EAGAIN), call)
    with path.open("wb") as file:
        rules.export_bpf(file)


def leave_session_keyring() -> None:
    """Gives this thread, and what it starts from now on, an empty session keyring. Where the kernel has none to give, the filter alone keeps
    programs from keys."""
    library = _library()
    number = library.resolve_syscall(library.Arch.NATIVE, "keyctl")
    ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.c_long(JOIN_SESSION_KEYRING), None)


def records_held(first: str, folder: str) -> int:
    """Bytes, about, that the kernel holds for the files of a sandbox's `folder` and for the page tables of its processes, of which `first` is the
    first (a number of the host's). Raises `OSError` where it has ended or is not to be looked into."""
    files = os.statvfs(f"/proc/{first}/root/{folder}")
    held = NAME * (files.f_files - files.f_ffree)
    processes = [first]
    while processes:
        process = Path("/proc", processes.pop())
        with suppress(OSError):  # it has ended
            tables = re.search(r"VmPTE:\s+(\d+) kB", (process / "status").read_text())
            held += 1024 * int(tables[1]) if tables else 0
            for thread in process.glob("task/*/children"):
                processes += thread.read_text().split()
    return held


def new_folder() -> "tempfile.TemporaryDirectory[str]":
    """A temporary folder that is this process's until it ends. Removes those of earlier processes of this user that were killed.

    A process holds a lock on its folder, which the kernel takes back however the process ends.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # of another user, in use, or gone
            if left.lstat().st_uid == os.geteuid():
                handle = _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
                os.close(handle)
    while True:
        folder = tempfile.TemporaryDirectory(prefix=PREFIX)
        with suppress(FileNotFoundError):  # removed by another process before it was locked
            handle = _locked(Path(folder.name), fcntl.LOCK_SH)
            weakref.finalize(folder, os.close, handle)
            if os.path.exists(folder.name):
                return folder
        folder.cleanup()


def _locked(folder: Path, kind: int) -> int:
    """A handle on `folder` with the lock. Raises `OSError` where another process holds it, or where `folder` is a link or a file."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, kind)
    except OSError:
        os.close(handle)
        raise
    return handle

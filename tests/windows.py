"""Windows, as far as Python on Linux can play it to this project's own code: the names that its standard library lacks,
and calls that it refuses. Libraries still see Linux."""

import builtins
import ctypes
import errno
import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]

# "Availability: Unix" in Python's manual, or not on Windows by its own words.
_OS = frozenset(
    """
    O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC O_TMPFILE P_PID
    POSIX_FADV_DONTNEED POSIX_FADV_SEQUENTIAL POSIX_FADV_WILLNEED ST_RDONLY WEXITED WEXITSTATUS WIFEXITED
    WIFSIGNALED WNOHANG WNOWAIT WTERMSIG WUNTRACED chown chroot confstr copy_file_range ctermid environb eventfd
    fchdir fchmod fchown fdatasync fork forkpty fstatvfs fwalk getegid geteuid getgid getgrouplist getgroups
    getloadavg getpgid getpgrp getpriority getrandom getresuid getsid getuid getxattr initgroups killpg lchmod
    lchown listxattr lockf major makedev memfd_create minor mkfifo mknod nice openpty pidfd_open pipe2
    posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev readv register_at_fork removexattr
    sched_getaffinity sched_setaffinity sched_yield sendfile setegid seteuid setgid setgroups setpgid
    setpriority setsid setuid setxattr splice statvfs sync sysconf tcgetpgrp uname wait wait3 wait4 waitid
    writev
    """.split()  # noqa: SIM905
)
_SIGNAL = frozenset(
    """
    SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGIO SIGKILL SIGPIPE SIGPROF SIGQUIT SIGRTMAX SIGRTMIN SIGSTOP SIGSYS
    SIGTRAP SIGTSTP SIGTTIN SIGTTOU SIGURG SIGUSR1 SIGUSR2 SIGVTALRM SIGWINCH SIGXCPU SIG_BLOCK SIG_SETMASK
    SIG_UNBLOCK alarm getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending
    sigtimedwait sigwait sigwaitinfo
    """.split()  # noqa: SIM905
)
LACKING = {"faulthandler": frozenset({"register", "unregister"}), "os": _OS, "signal": _SIGNAL}
LACKING_MODULES = ["fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "spwd", "syslog", "termios", "tty"]


OURS = ("configs", "data", "trainer", "launch", "__main__")


def write_sitecustomize(folder: Path) -> None:
    """In a folder that PYTHONPATH names: every Python started then begins by `pretend`."""
    text = f"import sys\nsys.path.append({str(ROOT)!r})\nimport tests.windows\ntests.windows.pretend()\n"
    (folder / "sitecustomize.py").write_text(text)


def pretend() -> None:
    """From now on our modules find what they would find on Windows. They must not have been imported before."""
    _replace(os, {"open": _open, "fsync": _fsync})
    _replace(signal, {})
    _replace(faulthandler, {})
    load_library, start, import_module = ctypes.CDLL.__init__, subprocess.Popen.__init__, builtins.__import__

    def load(self, name, *arguments, **settings):
        if name is None and _is_ours(2):
            raise TypeError("argument of type 'NoneType' is not iterable")
        load_library(self, name, *arguments, **settings)

    def start_without_fork(self, *arguments, **settings):
        if settings.get("preexec_fn") is not None:
            raise ValueError("preexec_fn is not supported on Windows platforms")
        start(self, *arguments, **settings)

    def send_term_alone(self, number):
        if number != signal.SIGTERM:
            raise ValueError(f"Unsupported signal: {number}")
        self.terminate()

    def import_unless_lacking(name, *arguments, **settings):
        if name in LACKING_MODULES and _is_ours(2):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_module(name, *arguments, **settings)

    ctypes.CDLL.__init__ = load
    subprocess.Popen.__init__, subprocess.Popen.send_signal = start_without_fork, send_term_alone
    builtins.__import__ = import_unless_lacking


def _is_ours(depth: int) -> bool:
    """Whether the code so many calls up is this project's."""
    return sys._getframe(depth).f_globals.get("__name__", "").partition(".")[0] in OURS


def _replace(module: ModuleType, calls: dict) -> None:
    lacking, get = set(LACKING[module.__name__]), ModuleType.__getattribute__

    class Windows(ModuleType):
        def __getattribute__(self, name: str) -> object:
            if (name in lacking or name in calls) and _is_ours(2):
                if name in lacking:
                    raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
                return calls[name]
            return get(self, name)

    module.__class__ = Windows


def _open(path, *arguments, **settings):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    return os.open(path, *arguments, **settings)


def _fsync(handle):
    import fcntl

    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    os.fsync(handle)

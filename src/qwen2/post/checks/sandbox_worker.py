"""The first half of a sandboxed program's process: takes its rights away, then becomes the program. Started by path by `sandbox.py`.

Knows nothing of the rest of qwen2. Three processes follow each other: this one, which leaves for new namespaces where it may; the
first process of the new ones, whose end is the end of all others in them; and the program. Where there are no namespaces the program
is in this one's process group and can start no process that would leave it.

Protocol: the job as JSON on stdin; on the descriptor that is the argument a line "begun" with a list of what could not be had, then a
line with the program's exit code, or minus the signal that ended it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

LINUX = sys.platform == "linux"
NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NETWORK = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NO_SUID, NO_DEV, RECURSIVE, PRIVATE = 2, 4, 0x4000, 0x40000  # flags of mount(2)
MOUNT_SETATTR, HERE, ALL_BELOW, READ_ONLY = 442, -100, 0x8000, 1  # mount_setattr(2), one number on every processor
DIE_WITH_PARENT, SET_SECCOMP, NO_NEW_PRIVILEGES, FILTER = 1, 22, 38, 2  # prctl(2)
EPERM, EAGAIN, ENOSYS = 1, 11, 38
NOBODY = 65534  # who the program is inside its namespace
# Numbers of system calls: processes, sockets, and what reaches other processes or the kernel's own doors
CALLS = {
    "x86_64": (
        0xC000003E,
        {"clone": 56, "fork": 57, "vfork": 58, "clone3": 435},
        [41, 62, 101, 109, 112, 165, 166, 248, 250, 272, 298, 308, 310, 311, 321, 323, 425, 129, 297, 424],
    ),
    "aarch64": (
        0xC00000B7,
        {"clone": 220, "clone3": 435},
        [198, 129, 117, 154, 157, 40, 39, 217, 219, 97, 241, 268, 270, 271, 280, 282, 425, 138, 240, 424],
    ),
}
CLONE_THREAD = 0x10000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of the classic packet filter
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
X32 = 0x40000000  # numbers of x86-64's other calling convention


def main() -> None:
    """Read the job, take away what can be taken, run the program, tell how it ended."""
    status = int(sys.argv[1])
    job = json.load(sys.stdin)
    missing: list[str] = []
    if LINUX:
        _die_with_parent()
    isolated = LINUX and _leave_namespaces(job["isolate"], missing)
    if isolated:
        _own_files(job, missing)
    os.chdir(job["folder"])
    if isolated:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            os._exit(0)
        _die_with_parent()
        _own_processes()
    _write(job)
    program = os.fork()
    if not program:
        _become(job, status, missing, isolated)
    _, code = os.waitpid(program, 0)
    os.write(status, f"{-os.WTERMSIG(code) if os.WIFSIGNALED(code) else os.WEXITSTATUS(code)}\n".encode())
    os._exit(0)


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _libc().prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)


def _leave_namespaces(wanted: bool, missing: list[str]) -> bool:
    """Enter new ones, as nobody in them."""
    user, group = os.geteuid(), os.getegid()
    if not wanted or _libc().unshare(NEW_USER | NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_PID | NEW_NETWORK):
        missing.append("user namespaces: files of yours could be changed, processes of yours ended")
        return False
    for path, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        with open(f"/proc/self/{path}", "w") as file:
            file.write(text)
    return True


def _own_files(job: dict[str, Any], missing: list[str]) -> None:
    """A file system of its own for the folder; all others can only be read."""
    libc, folder = _libc(), job["folder"].encode()
    options = f"size={job['limits']['disk']},mode=700".encode()

    def change(path: bytes, flags: int, on: int, off: int) -> bool:
        return bool(libc.syscall(MOUNT_SETATTR, HERE, path, flags, struct.pack("QQQQ", on, off, 0, 0), 32))

    failed = libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None) or libc.mount(b"none", folder, b"tmpfs", NO_SUID | NO_DEV, options)
    if failed or change(b"/", ALL_BELOW, READ_ONLY, 0) or change(folder, 0, 0, READ_ONLY):
        missing.append("mounts of its own: files of yours could be changed")


def _own_processes() -> None:
    """A view of the processes in this namespace only, where the system lets it be made, else of none: others' environments are theirs."""
    libc = _libc()
    if libc.mount(b"proc", b"/proc", b"proc", READ_ONLY | NO_SUID | NO_DEV, None):
        libc.mount(b"none", b"/proc", b"tmpfs", READ_ONLY | NO_SUID | NO_DEV, b"mode=555")


def _write(job: dict[str, Any]) -> None:
    for name, text in {**job["files"], ".stdin": job["stdin"]}.items():
        path = os.path.join(job["folder"], name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def _become(job: dict[str, Any], status: int, missing: list[str], isolated: bool) -> None:
    """The program, in this process."""
    if LINUX:
        _die_with_parent()
    stdin = os.open(".stdin", os.O_RDONLY)
    os.unlink(".stdin")
    os.dup2(stdin, 0)
    folder = job["folder"]
    names = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    filtered = LINUX and _filter(isolated, missing, only_look=True)
    _limit(job["limits"], filtered, missing)
    os.write(status, f"begun{json.dumps(missing)}\n".encode())
    os.set_inheritable(status, False)
    if filtered:
        _filter(isolated, missing)
    os.execve(job["python"], [job["python"], "-s", "-B", "main.py"], names)


def _limit(limits: dict[str, Any], filtered: bool, missing: list[str]) -> None:
    seconds = int(limits["seconds"]) + 1
    wanted = {"CPU": seconds, "AS": limits["memory"], "FSIZE": limits["disk"], "NOFILE": limits["files"], "CORE": 0}
    if not filtered:
        wanted["NPROC"] = 0
        missing.append("a filter of system calls: the network could be used")
        if os.geteuid() == 0:
            missing.append("a limit of processes for root")
    for name, value in wanted.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value + 1 if name == "CPU" else value))
        except (ValueError, OSError):
            missing.append(f"the limit {name}")


def _filter(isolated: bool, missing: list[str], only_look: bool = False) -> bool:
    """Forbid the system calls that a program has no need of, for good; whether this processor's numbers are known."""
    if os.uname().machine not in CALLS:
        return False
    if only_look:
        return True
    architecture, starts, others = CALLS[os.uname().machine]
    rules = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    rules += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, ERROR | ENOSYS)]
    refused = dict.fromkeys(others, EPERM) | {starts[name]: EAGAIN for name in ("fork", "vfork") if name in starts}
    for number, error in {**refused, starts["clone3"]: ENOSYS}.items():  # C libraries then ask by clone
        rules += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ERROR | error)]
    rules += [(EQUAL, 0, 3, starts["clone"]), (LOAD, 0, 0, 16), (ANY_BIT, 1, 0, CLONE_THREAD), (RETURN, 0, 0, ERROR | EAGAIN)]
    rules += [(RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code)))
    libc = _libc()
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(SET_SECCOMP, FILTER, program, 0, 0):
        os._exit(126)
    return True


if __name__ == "__main__":
    main()

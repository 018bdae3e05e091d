"""The shell programs that live in a sandbox. POSIX sh, because an image may have no more than sh and GNU coreutils.

``RUNNER`` serves calls, one after the other, as the work user. It takes frames on stdin and lets each command write to
its own stdout and stderr; after a command it kills every other process that it can, waits until they are gone, and ends
both streams with the frame's token. ``SESSION`` does the same inside one shell, so that the shell's state lasts.

Both run from a copy of sh that the work user may execute and not read. The kernel makes such a process undumpable:
no other process of the same user can trace it, read its memory or environment, or open its file descriptors. What a
hostile command can still do to a runner is to signal it (then its stream ends, or the call's time does, and the sandbox
is swept from outside), to lower its resource limits and priority, and to set flags of the streams that they share;
later commands inherit these, and ``renew`` ends them. A runner that belongs to root (Docker's profiles build and
compat) is not protected: grade in a fresh sandbox.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from envs.sandbox.common import Capture

TOOLS = "/run/posttrain"
"""Folder of the unreadable shell."""
START = (f"{TOOLS}/sh", "-c", 'eval "$program"')
"""Runs the program in the environment variable ``program``: a long argument would fill every list of processes."""


@dataclass(frozen=True, slots=True)
class Program:
    """A shell program that serves frames."""

    text: str
    moves: bool
    """Whether it may go on in a child of its first process, after that was killed."""


# The wait for what was killed to be gone (a second at most) is what makes the next command's processes all its own.
# Names begin with __ because a session's commands share them. Nothing here forks once a command has run, because the
# command may have used up the processes: read, kill, test and printf are built into the shell.
_COMMON = r"""
unset program
__ooms() {
    __n=0
    for __f in /sys/fs/cgroup/memory/memory.oom_control /sys/fs/cgroup/memory.events; do
        [ -r "$__f" ] && while read -r __k __v; do [ "$__k" = oom_kill ] && __n=$__v; done <"$__f"
    done
}
__sweep() {
    kill -9 -1 2>/dev/null
    __i=0
    while set -- /proc/[0-9]*; [ $# -gt "$__own" ] && [ $__i -lt 20000 ]; do __i=$((__i + 1)); done
}
__frame() {
    read -r __kind __token __limit __lines __size __block __count __spool <&9 || exit 0
    IFS= read -r __command <&9 || exit 0
    while [ "$__lines" -gt 1 ]; do
        IFS= read -r __line <&9 || exit 0
        __command="$__command
$__line"
        __lines=$((__lines - 1))
    done
}
__report() {
    __before=$__n
    __ooms
    printf '\n%s\n' "$__token"
    printf '\n%s %s %s %s\n' "$__token" "$1" "$((__n - __before))" "$2" >&2
}
exec 9<&0 </dev/null
read -r __token __own __first <&9 || exit 0
[ "$__first" = keep ] || __sweep
__ooms
__report 0 on
"""

# The time limit is kept from outside: `timeout` would cost each call as much as the rest of it.
# The data is padded to whole blocks: head may read beyond its count, dd never does. It goes through a file for a
# command, so that the stream is in step again before anything hostile runs, and through a pipe for our own programs.
RUNNER = Program(
    moves=False,
    text=_COMMON
    + r"""
feed() {
    dd bs="$__block" count="$__count" iflag=fullblock 2>/dev/null <&9 | {
        "$@"
        status=$?
        cat >/dev/null
        exit $status
    }
}
spool() { (umask 077; head -c "$__size" >"$__spool"); }
while __frame; do
    if [ "$__kind" = file ]; then
        feed head -c "$__size" 2>/dev/null | /bin/sh -c "$__command" 9<&-
        __report $? on
        continue
    fi
    if [ "$__size" = 0 ]; then
        /bin/sh -c "$__command" 9<&-
    elif feed spool 2>/dev/null; then
        { rm -f "$__spool"; /bin/sh -c "$__command" 9<&-; } <"$__spool"
    else
        rm -f "$__spool"
        echo 'sh: no space in /tmp for the input of this command' >&2
        false
    fi
    status=$?
    __sweep
    __report $status on
done
""",
)

# A copy of the shell waits beside each command: it is the alarm clock, and the state to go back to. Not as a child of
# the shell, whose `wait` would wait for it.
SESSION = Program(
    moves=True,
    text=_COMMON
    + r"""
__serve() {
    while __frame; do
        ( (sleep "$__limit" 9<&- || exit 0; __sweep; __report 137 late; __serve) & )
        trap '__status=$?; __sweep; __report $__status off' EXIT
        eval "$__command" 9<&-
        __status=$?
        trap - EXIT
        __sweep
        __report $__status on
    done
}
__serve
""",
)

# readlink -m also follows the links of a path whose end does not exist yet. The dot keeps a newline that ends the name.
_RESOLVE = r"""
p=$(readlink -m -- "$1"; echo .); p=${p%?.}
case "$p" in /work/?*) ;; *) exit 45;; esac
"""
READ = (
    _RESOLVE
    + r"""
[ -f "$p" ] || exit 44
[ -r "$p" ] || exit 45
stat -c %s -- "$p"; exec cat -- "$p"
"""
)
WRITE = (
    _RESOLVE
    + r"""
[ -d "$p" ] && exit 46
mkdir -p -- "${p%/*}" || exit 47
true >"$p" || exit 45
cat >"$p"; stat -c %s -- "$p"
"""
)


@dataclass(slots=True)
class Ended:
    """One call, as it ended."""

    out: Capture
    err: Capture
    status: int = 137
    timed_out: bool = False
    oom: bool = False
    alive: bool = False
    """Whether the program still serves."""


def on_file(program: str, path: str) -> str:
    """``program`` (READ or WRITE) for ``path``."""
    return f"set -- {shlex.quote(path)}\n{program}"


def frame(kind: str, token: str, limit_s: float, command: str, data: bytes, spool: str) -> bytes:
    """One call on the wire: a line of fields, the command's lines, the data padded to whole blocks."""
    block = 512 if len(data) < 1 << 16 else 1 << 16
    count = -(-len(data) // block)
    lines = command.count("\n") + 1
    head = f"{kind} {token} {limit_s:.3f} {lines} {len(data)} {block} {count} /tmp/.{spool}\n{command}\n"
    return head.encode(errors="replace") + data.ljust(count * block, b"\0")


def reported(ended: Ended, token: str) -> bool:
    """Whether both streams have ended with ``token``."""
    mark = f"\n{token}".encode()
    return ended.out.tail.endswith(mark + b"\n") and mark in ended.err.tail and ended.err.tail.endswith(b"\n")


def take_report(ended: Ended, token: str) -> None:
    """Move the report from the ends of the streams into ``ended``. A report that makes no sense is none: a session's
    commands know their token."""
    ended.out.cut(ended.out.total - len(token) - 2)
    at = ended.err.tail.rfind(f"\n{token}".encode())
    words = ended.err.tail[at:].split()[1:]
    ended.err.cut(ended.err.total - len(ended.err.tail) + at)
    if len(words) == 3 and words[0].isdigit() and words[1].isdigit() and len(words[0]) < 4:
        ended.status, ended.oom = int(words[0]), words[1] != b"0"
        ended.alive, ended.timed_out = words[2] != b"off", words[2] == b"late"


__all__ = [
    "READ",
    "RUNNER",
    "SESSION",
    "START",
    "TOOLS",
    "WRITE",
    "Ended",
    "Program",
    "frame",
    "on_file",
    "reported",
    "take_report",
]

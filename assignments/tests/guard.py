"""python guard.py <megabytes> <script> [arguments]: runs a script that may write only in the current folder.

Files it writes, its output among them, end at so many megabytes, its memory at 8 GB; it starts and ends no other program and opens
no connection.
This holds mistakes and pranks back; it is no wall against someone who means harm and writes machine code.
"""

import os
import resource
import runpy
import sys

CHANGES = {
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
}
REFUSED = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.kill", "os.killpg"}
REFUSED |= {"socket.connect", "socket.bind", "signal.pthread_kill", "os.setxattr", "os.removexattr"}


def install(folder):
    """Has Python ask before it opens, changes or starts anything."""
    folder = os.path.realpath(folder)

    def require_inside(path):
        if isinstance(path, int) or path is None:
            return
        path = os.path.realpath(os.fsdecode(path))
        if path != "/dev/null" and not path.startswith(folder + os.sep):
            raise PermissionError(f"a submission may write only in its own folder, not to {path}")

    def hook(event, arguments):
        if event in REFUSED:
            raise PermissionError(f"a submission may not call {event}")
        if event == "open":
            path, mode, flags = arguments
            if set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                if path != folder:  # a temporary file is announced by its folder, and no folder can be written as a file
                    require_inside(path)
        elif event in CHANGES:
            if any(isinstance(fd, int) and fd >= 0 for fd in arguments[-2:] if event in ("os.remove", "os.rmdir")):
                raise PermissionError("a submission may not remove files by folder descriptor")
            for path in arguments[:2]:
                if isinstance(path, str | bytes | os.PathLike):
                    require_inside(path)

    sys.addaudithook(hook)


if __name__ == "__main__":
    for kind, most in (("FSIZE", int(sys.argv[1]) * 2**20), ("DATA", 8 * 2**30), ("CORE", 0)):
        kind = getattr(resource, f"RLIMIT_{kind}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    del sys.argv[:2]
    install(os.getcwd())
    runpy.run_path(sys.argv[0], run_name="__main__")

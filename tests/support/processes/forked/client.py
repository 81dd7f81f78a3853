"""Stand for a command that runs in a fork of `server.py`: hand over words, folder, environment and streams, pass on
signals, and end as the fork does. `client.py ADDRESS WORDS`; imports little, because it starts for every command."""

import json
import os
import signal
import socket
import sys


def main() -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    request = {"words": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ), "deaf": deaf}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH):
        if number != signal.SIGINT or not deaf:
            signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
    data = json.dumps(request).encode()
    socket.send_fds(connection, [len(data).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(data)
    answer = connection.recv(4)
    status = os.waitstatus_to_exitcode(int.from_bytes(answer, "big")) if answer else 125
    if status >= 0:
        os._exit(status)
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)


if __name__ == "__main__":
    main()

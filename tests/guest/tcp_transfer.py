"""Move bytes through TCP and print their SHA-256: `tcp_transfer.py listen|connect ADDRESS send|receive FLOWS BYTES`."""

import hashlib
import os
import socket
import sys
import threading

PORT, PATIENCE_S = 7000, 120


def move(stream, action, size):
    """The digest of `size` random bytes that were sent, or of what came until the other side closed."""
    digest = hashlib.sha256()
    with stream:
        stream.settimeout(PATIENCE_S)
        if action == "send":
            data = os.urandom(size)
            digest.update(data)
            stream.sendall(data)
            stream.shutdown(socket.SHUT_WR)
            stream.recv(1)  # it has all of it
        else:
            while data := stream.recv(1 << 16):
                digest.update(data)
                size -= len(data)
            assert size == 0, f"{size} bytes are missing"
    return digest.hexdigest()


def main(role, address, action, flows, size):
    if role == "listen":
        with socket.create_server((address, PORT)) as server:
            print("listening", flush=True)
            server.settimeout(PATIENCE_S)
            streams = [server.accept()[0] for _ in range(flows)]
    else:
        streams = [socket.create_connection((address, PORT), PATIENCE_S) for _ in range(flows)]
    digests = [None] * flows

    def run(k):
        digests[k] = move(streams[k], action, size // flows)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(flows)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(*sorted(map(str, digests)))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))

"""Let agents that others have started call the launcher back, each over a socket of its own.

The launcher's addresses and a key that holds for one attempt alone travel as an environment variable. With the key, an
agent makes sure that the program it gets, and each message after it, come from the launcher, and the launcher that they
come from an agent.
"""
import asyncio
import hashlib
import hmac
import secrets
import socket
from typing import Sequence

from mxsimmim.cluster.connections import AgentConnection, program
from mxsimmim.cluster.messages import Message, MessageStream, secret

VARIABLE = 'MXSIMMIM_LAUNCH'  # its value: the launcher's addresses with commas between, port, key
BOOTSTRAP = """\
import hashlib, hmac, os, socket, sys
addresses, port, key = os.environ.pop('MXSIMMIM_LAUNCH').split()
for address in addresses.split(','):
    try:
        connection = socket.create_connection((address, int(port)), 5)
    except OSError as error:
        print(f'{socket.gethostname()} cannot reach the launcher at {address}:{port}: {error}', file=sys.stderr)
        continue
    file = connection.makefile('rb')
    size, nonce, proof = file.readline().split()
    text = file.read(int(size))
    if hmac.compare_digest(proof.decode(), hmac.new(bytes.fromhex(key), nonce + text, hashlib.sha256).hexdigest()):
        secret = hmac.new(bytes.fromhex(key), nonce, hashlib.sha256).digest()
        exec(text)
"""
CALL = 'main(connection.fileno(), connection.fileno(), secret, connection.getsockname()[0])'


def greeting(key: bytes, nonce: bytes, text: bytes) -> bytes:
    """Write what an agent gets when it calls: its program, with the proof that it is ours."""
    proof = hmac.new(key, nonce + text, hashlib.sha256).hexdigest()
    return b'%d %s %s\n' % (len(text), nonce, proof.encode()) + text


class Callbacks:
    """Answer the calls of agents; each finds its connection by the rank that it says.

    Args:
        addresses: of this machine, where agents may reach it; of several, it listens on all.
        agents: the connections, by rank.
    """

    def __init__(self, addresses: Sequence[str], agents: Sequence[AgentConnection]) -> None:
        self.loop = asyncio.get_running_loop()
        self.agents, self.key, self.program = agents, secrets.token_bytes(32), program(CALL)
        self.listener = socket.socket()
        self.listener.bind((addresses[0] if len(addresses) == 1 else '', 0))
        self.listener.listen(len(agents))
        self.variable = f"{','.join(addresses)} {self.listener.getsockname()[1]} {self.key.hex()}"  # for the agents
        self.loop.add_reader(self.listener.fileno(), self._accept)

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        nonce = secrets.token_hex(16).encode()

        def hello(message: Message) -> None:
            def closed() -> None:
                connection.close()
                agent.close()
            agent = self.agents[message['rank']]
            if agent.messages:
                return messages.close()
            agent.messages, messages.received = messages, agent.receive
            messages.closed = closed
            if all(agent.messages for agent in self.agents):
                self.close()
            agent.receive(message)
        messages = MessageStream(self.loop, connection.fileno(), connection.fileno(), hello, connection.close,
                                 secret(self.key, nonce))
        messages.write(greeting(self.key, nonce, self.program))

    def close(self) -> None:
        """Take no more calls; an agent that has not called will not."""
        if self.listener.fileno() >= 0:
            self.loop.remove_reader(self.listener.fileno())
            self.listener.close()
        for agent in self.agents:
            if not agent.messages:
                agent.close()

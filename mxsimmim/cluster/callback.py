"""Let agents that others have started call the launcher back, each over a socket of its own.

The launcher's addresses and a key that holds for one attempt alone travel as an environment variable. With the key, an
agent makes sure that the program it gets, and each message after it, come from the launcher, and the launcher that they
come from an agent.
"""
import asyncio
import hashlib
import hmac
import os
import secrets
import socket
import sys
from typing import List, Mapping, Optional, Sequence

from mxsimmim.cluster import inspection
from mxsimmim.cluster.connections import AgentConnection, Command, program
from mxsimmim.cluster.messages import Message, MessageStream, secret

VARIABLE = 'MXSIMMIM_LAUNCH'  # its value: the launcher's addresses with commas between, port, key
BOOTSTRAP = """\
import hashlib, hmac, os, socket, sys
addresses, port, key = os.environ.pop('MXSIMMIM_LAUNCH').split()
failed = []
for address in addresses.split(','):
    try:
        connection = socket.create_connection((address, int(port)), 5)
        connection.settimeout(150)  # it may be about to start the job again
        file = connection.makefile('rb')
        size, nonce, proof = file.readline().split()
        text = file.read(int(size))
    except (OSError, ValueError) as error:
        failed.append(f'{socket.gethostname()} cannot reach the launcher at {address}:{port}: {error}')
        continue
    if hmac.compare_digest(proof.decode(), hmac.new(bytes.fromhex(key), nonce + text, hashlib.sha256).hexdigest()):
        secret = hmac.new(bytes.fromhex(key), nonce, hashlib.sha256).digest()
        exec(text)
sys.exit('; '.join(failed) or f'{socket.gethostname()}: who answers is not the launcher')
"""
AGENT = sys.executable, '-X', 'utf8', '-c', BOOTSTRAP  # the words of one
CALL = 'main(connection.fileno(), connection.fileno(), secret, connection.getsockname()[0], {place!a})'


def greeting(key: bytes, nonce: bytes, text: bytes) -> bytes:
    """Write what an agent gets when it calls: its program, with the proof that it is ours."""
    proof = hmac.new(key, nonce + text, hashlib.sha256).hexdigest()
    return b'%d %s %s\n' % (len(text), nonce, proof.encode()) + text


class Callbacks:
    """Answer the calls of agents; each finds its connection by the place that it says.

    Args:
        listener: where they call; it is closed when all have come.
        place: the variable in which an agent finds its place.
        agents: the connections, by place.
        key: with which launcher and agents prove themselves to each other.
    """

    def __init__(self, listener: socket.socket, place: str, agents: Mapping[str, AgentConnection], key: bytes) -> None:
        self.loop = asyncio.get_running_loop()
        self.listener, self.agents, self.key = listener, agents, key
        self.program = program(CALL.format(place=place))
        self.loop.add_reader(self.listener.fileno(), self._accept)

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        nonce = secrets.token_hex(16).encode()

        def hello(message: Message) -> None:
            def closed() -> None:
                connection.close()
                agent.close()
            if message['place'] not in self.agents:
                return messages.close()
            agent: AgentConnection = self.agents[message['place']]
            if agent.messages:
                return messages.close()
            agent.messages, messages.received = messages, agent.receive
            messages.closed = closed
            if all(agent.messages for agent in self.agents.values()):
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
        for agent in self.agents.values():
            if not agent.messages:
                agent.close()


def start_all(command: Sequence[str], addresses: Sequence[str], place: str, agents: Mapping[str, AgentConnection],
              environ: Optional[Mapping[str, str]] = None) -> None:
    """Start the agents of these connections, as `Callbacks` takes them, by one command.

    Args:
        addresses: of this machine, where agents may reach it; of several, it listens on all.

    Raises:
        ValueError: there is no such command.
    """
    listener, key = socket.socket(), secrets.token_bytes(32)
    listener.bind((addresses[0] if len(addresses) == 1 else '', 0))
    listener.listen(len(agents))
    callbacks = Callbacks(listener, place, agents, key)
    variable = f"{','.join(addresses)} {listener.getsockname()[1]} {key.hex()}"
    try:
        made = Command(command, {**(os.environ if environ is None else environ), VARIABLE: variable})
    except ValueError:
        callbacks.close()
        raise
    made.silent.add_done_callback(lambda _: callbacks.close())
    first, *_ = agents.values()
    first.command = made
    for agent in agents.values():
        agent.starter = made


def why_none_came(agents: Sequence[AgentConnection]) -> List[str]:
    """Return what the one command said that started all of these agents, if it has ended."""
    command = agents[0].command
    if not command or not command.silent.done():
        return []
    return [line for line in command.lines if line.strip(' -')]


def own_addresses(interface: str, elsewhere: bool) -> List[str]:
    """List the addresses of this machine at which agents may reach it, the likely ones first.

    Args:
        interface: of the job, if the user has named it.
        elsewhere: whether agents may run on other hosts.
    """
    known = inspection.interfaces()
    if interface in known:
        return [known[interface]]
    if elsewhere:
        return sorted(known.values(), key=lambda address: address.startswith('127.'))
    return ['127.0.0.1']

"""What a launcher's terminal would show."""


class Screen:
    """In place of `cluster.terminal.Terminal`: keeps the lines that the launcher says, and what processes write."""

    def __init__(self):
        self.lines, self.output = [], b''

    def put(self, stream, data, missed=0):
        self.output += data

    def say(self, *lines):
        self.lines += lines

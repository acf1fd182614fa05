#!/usr/bin/env python3
"""Real mail clients against a server built with this library.

    test_clients.py [--no-skip] [--only CLIENT] PATH_TO_RECORDER

PATH_TO_RECORDER is a program that listens on 127.0.0.1, on a port that it
chooses and names in its first line of output (`port N`), and that appends a
line of JSON to the file named by its first argument for every message:

    {"peer": ..., "mailfrom": ..., "rcpttos": [...], "mail_options": [...],
     "data_hex": "..."}

It understands --smtputf8, --decode-data and --size N.

Each client sends each kind of message, and what was recorded must be what was
sent.  A client that is not installed is skipped; with --no-skip (or NO_SKIP=1
in the environment) it fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True

from clients import CLIENTS, MESSAGES, Message, SmtpSource  # noqa: E402
from results import Results, Skip, same, terminate_on_signal  # noqa: E402
from upstreams import HOST, MissingTool, stop_process, wait_until  # noqa: E402


class Recorder:
    """A running recorder, and the reader of its file."""

    def __init__(self, program, *options):
        self.program = program
        self.options = options

    def __enter__(self):
        self.file = tempfile.NamedTemporaryFile(prefix='interop-')
        self.offset = 0
        self.process = subprocess.Popen(
            [self.program, self.file.name] + list(self.options),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        line = self.process.stdout.readline().decode()
        if not line.startswith('port '):
            stop_process(self.process)
            raise RuntimeError('%s did not name its port but said %r'
                               % (self.program, line))
        self.port = int(line.split()[1])
        return self

    def __exit__(self, *exc):
        stop_process(self.process)
        self.process.stdout.close()
        self.file.close()

    def new(self):
        """The messages recorded since the last call."""
        with open(self.file.name, 'rb') as f:
            f.seek(self.offset)
            text = f.read()
        text = text[:text.rfind(b'\n') + 1]
        self.offset += len(text)
        return [json.loads(line) for line in text.splitlines()]

    def wait_for(self, n, timeout=10):
        """Wait until n new messages are there; no more may be."""
        found = []

        def check():
            found.extend(self.new())
            return len(found) >= n
        wait_until(check, timeout, '%d messages recorded' % n)
        assert len(found) == n, '%d messages instead of %d' % (len(found), n)
        return found


def send(client, recorder, message):
    try:
        return client.send(HOST, recorder.port, message)
    except MissingTool as e:
        raise Skip(e)


def arrives(client, recorder, message):
    """The message is accepted and recorded as it was sent."""
    recorder.new()
    sent = send(client, recorder, message)
    assert sent.accepted, 'not accepted: %s' % sent.output
    got, = recorder.wait_for(1)
    assert '127.0.0.1' in json.dumps(got['peer']), 'peer %r' % got['peer']
    assert got['mailfrom'] == sent.mailfrom, 'mailfrom %r' % got['mailfrom']
    assert got['rcpttos'] == sent.rcpttos, 'rcpttos %r' % got['rcpttos']
    same(bytes.fromhex(got['data_hex']), sent.data)
    options = [o.upper() for o in got['mail_options']]
    for option in sent.options:
        assert option in options, '%s is not in %r' % (option, options)
    if client.needs_smtputf8(message) and not client.smtputf8:
        return 'without SMTPUTF8, which %s does not know' % client.name


def refused(client, recorder, message):
    """The client is told that the message is refused; none is recorded."""
    recorder.new()
    sent = send(client, recorder, message)
    assert not sent.accepted, 'accepted'
    got = recorder.new()
    assert not got, 'recorded all the same'
    # The server goes on.
    small = MESSAGES['8bit-text']
    arrives(client, recorder, small)


def many_sessions(recorder):
    """200 messages over 20 sessions at a time: all arrive."""
    try:
        source = SmtpSource.tool()
    except MissingTool as e:
        raise Skip(e)
    recorder.new()
    subprocess.run([source, '-m', '200', '-s', '20', '-l', '3000',
                    '-f', 'author@example.test',
                    '-t', 'recipient@example.test',
                    '%s:%d' % (HOST, recorder.port)], check=True, timeout=60,
                   stdin=subprocess.DEVNULL)
    for got in recorder.wait_for(200):
        assert got['rcpttos'] == ['recipient@example.test'], got['rcpttos']


def main():
    parser = argparse.ArgumentParser(
        description='Real mail clients against a recorder.')
    parser.add_argument('recorder')
    parser.add_argument('--no-skip', action='store_true',
                        default=bool(os.environ.get('NO_SKIP')))
    parser.add_argument('--only', metavar='CLIENT', action='append',
                        choices=[c.name for c in CLIENTS])
    args = parser.parse_args()
    terminate_on_signal()
    results = Results(args.no_skip)
    clients = [c for c in CLIENTS if not args.only or c.name in args.only]

    runs = [((), ('plain', 'dots', '8bit', '8bit-text', '10MiB')),
            (('--smtputf8',), ('plain', '8bit', 'utf8-address')),
            (('--decode-data',), ('plain', 'dots', '8bit-text'))]
    for options, kinds in runs:
        with Recorder(args.recorder, *options) as recorder:
            for client in clients:
                for kind in kinds:
                    name = ' '.join((client.name, kind) + options)
                    results.run(name, arrives, client, recorder,
                                MESSAGES[kind])
            if not options:
                results.run('smtp-source, 20 sessions at a time',
                            many_sessions, recorder)

    too_long = Message('too-long', 'author@example.test',
                       ['recipient@example.test'],
                       MESSAGES['plain'].content + b'too long\n' * 1000)
    with Recorder(args.recorder, '--size', '5000') as recorder:
        for client in clients:
            results.run('%s over the size limit' % client.name,
                        refused, client, recorder, too_long)
    return results.close()


if __name__ == '__main__':
    sys.exit(main())

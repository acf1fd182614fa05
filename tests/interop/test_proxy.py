#!/usr/bin/env python3
"""The proxies between real clients' bytes and real mail servers.

    test_proxy.py [--no-skip] [--only PART]... [--messages N] PATH_TO_SMTPD

Parts:

    postfix   1,000 messages from 20 clients through PureProxy into Postfix
    restart   the same, with Postfix killed and started again in the middle,
              and clients that retry what got a 4xx
    exim      a smaller run into Exim
    sink      smtp-sink with its faults: what the client is told
    smuggle   every known trick to end a message early, into Postfix
    mailman   MailmanProxy between Mailman 3 and Postfix

PATH_TO_SMTPD is the command line program; it is started as
`smtpd -n 127.0.0.1:PORT 127.0.0.1:UPSTREAM`.  A part whose server is not
installed is skipped; with --no-skip (or NO_SKIP=1 in the environment) it
fails.  The servers need root.
"""

import argparse
import collections
import itertools
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time

sys.dont_write_bytecode = True

from results import Results, same, terminate_on_signal  # noqa: E402
from upstreams import (                                 # noqa: E402
    HOST, Exim, Mailman, MissingTool, Postfix, RecordingSink, SmtpSink,
    free_port, stop_process, tail, wait_for_greeting, wait_until)

SEED = 20240601


# ---------------------------------------------------------------------------
# The proxy and a client for it.

class Proxy:
    """A running proxy in front of the server on port `upstream`."""

    def __init__(self, program, upstream, *options):
        self.port = free_port()
        self.command = ([program, '-n'] + list(options)
                        + ['%s:%d' % (HOST, self.port),
                           '%s:%d' % (HOST, upstream)])

    def __enter__(self):
        self.log = tempfile.NamedTemporaryFile(prefix='interop-')
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=self.log,
            stderr=self.log)
        try:
            wait_for_greeting(self.port, self.process, log=self.log.name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc):
        status = self.process.poll()
        stop_process(self.process)
        text = tail(self.log.name)
        self.log.close()
        if status is not None:
            raise AssertionError('the proxy ended with status %d%s'
                                 % (status, text))
        if exc and exc[0] and text.strip():
            print('the proxy said:%s' % text, flush=True)


class Lost(Exception):
    """The proxy closed the connection."""


class Session:
    """A client that writes exactly the bytes it is given."""

    def __init__(self, port, timeout=30):
        self.socket = socket.create_connection((HOST, port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile('rb')
        self.port = port
        code, text = self.reply()
        assert code == 220, 'greeting %s %s' % (code, text)
        code, text = self.command('EHLO client.example.test')
        assert code == 250, 'EHLO: %s %s' % (code, text)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()
        self.socket.close()

    def send(self, data):
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as e:
            raise Lost(str(e))

    def reply(self):
        """One reply: its code and its text."""
        texts = []
        while True:
            try:
                line = self.file.readline()
            except ConnectionResetError as e:
                raise Lost(str(e))
            if not line.endswith(b'\r\n'):
                raise Lost('after %r' % line)
            assert re.match(rb'[2-5][0-9][0-9][ -]', line), 'reply %r' % line
            texts.append(line[4:-2].decode('utf-8', 'replace'))
            if line[3:4] == b' ':
                return int(line[:3]), '\n'.join(texts)

    def command(self, text):
        self.send(text.encode() + b'\r\n')
        return self.reply()

    def quit(self):
        code, text = self.command('QUIT')
        assert code == 221, 'QUIT: %s %s' % (code, text)

    def mail(self, mailfrom, rcpttos, content, pipelined=False):
        """One transaction, up to its end or to what ends it before.

        Returns an Outcome; `content` is what goes over the wire between the
        reply to DATA and the dot, without the line end before that dot.
        """
        commands = (['MAIL FROM:<%s>' % mailfrom]
                    + ['RCPT TO:<%s>' % r for r in rcpttos] + ['DATA'])
        if pipelined:
            self.send(''.join(c + '\r\n' for c in commands).encode())
            replies = [self.reply() for _ in commands]
        else:
            replies = []
            for command in commands:
                if command == 'DATA' and not any(
                        code == 250 for code, _ in replies[1:]):
                    break
                replies.append(self.command(command))
                if len(replies) == 1 and replies[0][0] != 250:
                    break
        mail, rcpts = replies[0], replies[1:len(rcpttos) + 1]
        data = replies[len(rcpttos) + 1:]
        if mail[0] != 250:
            stage, last = 'MAIL', mail
        elif not any(code == 250 for code, _ in rcpts):
            stage, last = 'RCPT', rcpts[0]
        else:
            stage, last = 'DATA', data[0]
        if data and data[0][0] == 354:
            self.send(content + b'\r\n.\r\n')
            end = self.reply()
            if stage == 'DATA':
                stage, last = 'END', end
            else:
                assert end[0] != 250, 'accepted after a refused %s' % stage
        elif stage in ('MAIL', 'RCPT'):
            code, text = self.command('RSET')
            assert code == 250, 'RSET: %s %s' % (code, text)
        return Outcome(stage, last[0], last[1], [code for code, _ in rcpts])


Outcome = collections.namedtuple('Outcome', 'stage code text rcpts')


def stuffed(content):
    """Content with CRLF line ends as it goes over the wire."""
    return re.sub(rb'(?m)^\.', b'..', content.replace(b'\n', b'\r\n'))


def with_x_peer(content):
    """Where PureProxy puts its header: before the first empty line."""
    lines = content.split(b'\n')
    at = lines.index(b'') if b'' in lines else len(lines)
    lines.insert(at, b'X-Peer: 127.0.0.1')
    return b'\n'.join(lines)


# ---------------------------------------------------------------------------
# Many messages from many clients.

Job = collections.namedtuple(
    'Job', 'key rcpttos refused pipelined content')


def make_jobs(n):
    """n different messages, short and long, with dots and any bytes."""
    rng = random.Random(SEED)
    jobs = []
    for i in range(n):
        key = 'message-%d' % i
        lines = []
        count = rng.choice((0, 1, 3, 10, 30, 30, 100))
        if i % 97 == 0:
            count = 3000
        for _ in range(count):
            lines.append(rng.choice((
                b'', b'.', b'..', b'...', b'. ', b'.x', b'From here',
                b'y' * rng.randrange(80), b'z' * rng.randrange(998),
                bytes(rng.choice(_ANY) for _ in range(rng.randrange(200))))))
        rcpttos = ['recipient%d@example.test' % (i % 7)]
        if i % 10 == 3:
            rcpttos.append('another@example.test')
        refused = ['recipient@refused.test'] if i % 10 == 7 else []
        head = ('From: <author@example.test>\n'
                'To: <%s>\n'
                'Subject: %s\n'
                'Message-ID: <%s@example.test>\n'
                'Date: Sat, 01 Jan 2022 00:00:00 +0000\n\n'
                % (rcpttos[0], key, key))
        jobs.append(Job(key, rcpttos, refused, i % 2 == 1,
                        head.encode() + b'\n'.join(lines)))
    return jobs


_ANY = bytes(b for b in range(256) if b not in b'\r\n')


class Load:
    """Clients that send all the jobs, each message until it is accepted.

    A client keeps its session for several messages.  What got a 4xx, at
    whatever stage, is sent again once `up` is set.
    """

    PER_SESSION = 12

    def __init__(self, port, jobs, clients):
        self.port = port
        self.clients = clients
        self.jobs = collections.deque(jobs)
        self.changed = threading.Condition()
        self.up = threading.Event()
        self.up.set()
        self.accepted = 0
        self.deferred = 0
        self.first_deferral = ''
        self.failures = collections.Counter()   # 4xx replies of each job
        self.errors = []
        self.threads = [threading.Thread(target=self._client, daemon=True)
                        for _ in range(clients)]

    def start(self):
        for thread in self.threads:
            thread.start()

    def wait(self, check, what, timeout=120):
        with self.changed:
            ok = self.changed.wait_for(
                lambda: self.errors or check(), timeout)
        assert not self.errors, self.errors[0]
        assert ok, 'timed out: %s' % what

    def join(self, timeout=150):
        for thread in self.threads:
            thread.join(timeout)
            assert not self.errors, self.errors[0]
            assert not thread.is_alive(), 'a client is still waiting'

    def _client(self):
        try:
            while True:
                with Session(self.port) as session:
                    for _ in range(self.PER_SESSION):
                        try:
                            job = self.jobs.popleft()
                        except IndexError:
                            session.quit()
                            return
                        self._deliver(session, job)
                    session.quit()
        except Exception as e:
            with self.changed:
                self.errors.append('%s: %s' % (type(e).__name__, e))
                self.changed.notify_all()

    def _deliver(self, session, job):
        while True:
            self.up.wait(60)
            outcome = session.mail(
                'author@example.test', job.rcpttos + job.refused,
                stuffed(job.content), job.pipelined)
            done = outcome.stage == 'END' and outcome.code == 250
            wanted = outcome.rcpts[:len(job.rcpttos)]
            told = '%s: %s' % (job.key, outcome)
            if done:
                assert set(wanted) == {250}, told
                assert all(550 <= code <= 559
                           for code in outcome.rcpts[len(wanted):]), told
            else:
                # A 5xx at any place would make a client give the message up
                # for a recipient; after a refused MAIL it looks no further.
                assert 400 <= outcome.code < 500, told
                assert outcome.stage == 'MAIL' or all(
                    code == 250 or 400 <= code < 500 for code in wanted), told
            with self.changed:
                if done:
                    self.accepted += 1
                    self.changed.notify_all()
                    return
                self.deferred += 1
                self.first_deferral = self.first_deferral or told
                self.failures[job.key] += 1
                self.changed.notify_all()


def check_delivered(jobs, delivered, failures):
    """Every message is there, byte for byte, and none too often.

    A copy is one that the proxy made: the same text under another queue id.
    (A server that was killed may deliver one transaction twice itself.)
    Returns how many copies there were.
    """
    found = collections.defaultdict(set)
    contents = {}
    for message in delivered:
        match = re.search(rb'^Message-ID: <([^@>]+)@', message.content, re.M)
        assert match, 'an unknown message: %r' % message.raw[:500]
        key = match.group(1).decode()
        found[key, message.recipient].add(message.queue_id)
        contents.setdefault(key, message.content)
        same(message.content, contents[key], key)
        assert message.sender == 'author@example.test', message.sender
    copies = 0
    for job in jobs:
        for rcpt in job.rcpttos:
            ids = found.pop((job.key, rcpt), ())
            assert ids, '%s never arrived for %s' % (job.key, rcpt)
            assert len(ids) <= 1 + failures[job.key], \
                '%s arrived %d times for %s; its client was put off %d times' \
                % (job.key, len(ids), rcpt, failures[job.key])
            copies += len(ids) - 1
        same(contents[job.key], with_x_peer(job.content) + b'\n', job.key)
    assert not found, 'arrived unasked: %s' % list(found)[:5]
    return copies


def load_into(server, program, messages, clients):
    jobs = make_jobs(messages)
    server.clear()
    with Proxy(program, server.port) as proxy:
        load = Load(proxy.port, jobs, clients)
        load.start()
        load.join()
        assert load.deferred == 0, '%d times put off, first %s' % (
            load.deferred, load.first_deferral)
    delivered = server.wait_idle()
    check_delivered(jobs, delivered, load.failures)
    files = sum(len(job.rcpttos) for job in jobs)
    assert len(delivered) == files, \
        '%d files instead of %d' % (len(delivered), files)
    return '%d messages from %d clients' % (messages, clients)


def part_postfix(results, args):
    with Postfix() as postfix:
        results.run('PureProxy into Postfix', load_into,
                    postfix, args.smtpd, args.messages, 20)


def part_exim(results, args):
    with Exim() as exim:
        results.run('PureProxy into Exim', load_into,
                    exim, args.smtpd, min(args.messages, 150), 10)


def part_restart(results, args):
    def case():
        jobs = make_jobs(args.messages)
        with Postfix() as postfix:
            with Proxy(args.smtpd, postfix.port) as proxy:
                load = Load(proxy.port, jobs, 20)
                load.start()
                for share in (0.25, 0.5, 0.75):
                    n = int(args.messages * share)
                    load.wait(lambda: load.accepted >= n, '%d accepted' % n)
                    before = load.deferred
                    load.up.clear()
                    postfix.kill()
                    load.wait(lambda: load.deferred > before,
                              'a 4xx while Postfix is down')
                    postfix.start()
                    load.up.set()
                load.join()
            delivered = postfix.wait_idle()
            copies = check_delivered(jobs, delivered, load.failures)
            return ('%d messages, %d times put off, %d came again after that'
                    % (args.messages, load.deferred, copies))
    results.run('PureProxy into Postfix, killed three times', case)


# ---------------------------------------------------------------------------
# smtp-sink and its faults.

# The options, and the end that they must bring: the stage and a pattern for
# the code.  The proxy may ask upstream for DATA before or after it has the
# message, so a refusal of DATA may be told at either place.
SINK_FAULTS = [
    ('', 'END', '250'),
    ('-8', 'END', '250'),
    ('-e', 'END', '250'),
    ('-p', 'END', '250'),
    ('-P', 'END', '250'),
    ('-f EHLO', 'END', '250'),
    ('-f QUIT', 'END', '250'),
    ('-q QUIT', 'END', '250'),
    ('-Q QUIT', 'END', '250'),
    ('-f CONNECT', 'MAIL', '[45]..'),
    ('-r CONNECT', 'MAIL', '[45]..'),
    ('-q CONNECT', 'MAIL', '451'),
    ('-Q CONNECT', 'MAIL', '451'),
    ('-f EHLO,HELO', 'MAIL', '[45]..'),
    ('-r EHLO,HELO', 'MAIL', '[45]..'),
    ('-q EHLO,HELO', 'MAIL', '451'),
    ('-Q EHLO,HELO', 'MAIL', '451'),
    ('-f MAIL', 'MAIL', '5..'),
    ('-r MAIL', 'MAIL', '4..'),
    ('-q MAIL', 'MAIL', '451'),
    ('-Q MAIL', 'MAIL', '451'),
    ('-f RCPT', 'RCPT', '5..'),
    ('-r RCPT', 'RCPT', '4..'),
    ('-q RCPT', 'RCPT', '451'),
    ('-Q RCPT', 'RCPT', '451'),
    ('-f DATA', 'DATA END', '5..'),
    ('-r DATA', 'DATA END', '4..'),
    ('-q DATA', 'DATA END', '451'),
    ('-Q DATA', 'DATA END', '451'),
    ('-f .', 'END', '5..'),
    ('-r .', 'END', '4..'),
    ('-q .', 'END', '451'),
    ('-Q .', 'END', '451'),
]


def sink_case(program, options, stages, pattern, pipelined):
    content = (b'Subject: to the sink\n\n.\n..\nbytes: \xe9\xff\n'
               b'the end')
    rcpttos = ['recipient@example.test', 'another@example.test']
    with SmtpSink(options.split()) as sink, \
            Proxy(program, sink.port) as proxy, \
            Session(proxy.port) as session:
        for round_ in (1, 2):
            outcome = session.mail('author@example.test', rcpttos,
                                   stuffed(content), pipelined)
            told = '%s: %s %s' % (outcome.stage, outcome.code, outcome.text)
            assert outcome.stage in stages.split() \
                and re.fullmatch(pattern, str(outcome.code)), told
            if outcome.stage == 'RCPT':
                # Each recipient is told why, not that RCPT is out of place.
                for code in outcome.rcpts:
                    assert re.fullmatch(pattern, str(code)), outcome.rcpts
            code, text = session.command('NOOP')
            assert code == 250, 'NOOP: %s %s' % (code, text)
            if outcome.code == 250:
                got = sink.wait_for(round_)
                assert len(got) == round_, '%d messages' % len(got)
                for message in got:
                    same(message.content, with_x_peer(content) + b'\n')
                    assert message.rcpt_args == ['<%s>' % r for r in rcpttos]
        session.quit()
        return told.splitlines()[0]


def lost_between_recipients(program, pipelined):
    """Upstream goes away when one recipient is accepted already.

    A 5xx for DATA would make a client give up the accepted one for good.
    """
    def reply(line):
        return '' if 'another' in line else None
    with RecordingSink(replies={'RCPT': reply}) as sink, \
            Proxy(program, sink.port) as proxy, \
            Session(proxy.port) as session:
        outcome = session.mail(
            'author@example.test',
            ['recipient@example.test', 'another@example.test',
             'third@example.test'], b'Subject: lost\r\n', pipelined)
        assert outcome.rcpts == [250, 451, 451], str(outcome)
        assert outcome.code == 451, str(outcome)
        assert not sink.messages, sink.messages
        # The next one is a new transaction on a new connection.
        outcome = session.mail('author@example.test',
                               ['recipient@example.test'], b'Subject: next')
        assert outcome.code == 250, str(outcome)
        assert len(sink.messages) == 1, sink.messages
        session.quit()


def part_sink(results, args):
    for options, stages, pattern in SINK_FAULTS:
        for pipelined in (False, True):
            results.run('smtp-sink %s%s' % (
                options, ' (pipelined)' if pipelined else ''),
                sink_case, args.smtpd, options, stages, pattern, pipelined)
    for pipelined in (False, True):
        results.run('upstream lost between two recipients%s' % (
            ' (pipelined)' if pipelined else ''),
            lost_between_recipients, args.smtpd, pipelined)


# ---------------------------------------------------------------------------
# Smuggling.

# What somebody, somewhere, has taken for the end of a line.
_ENDS = (b'\r\n', b'\n', b'\r', b'\r\r\n', b'\n\r', b'\n\n', b'\r\r',
         b'\0\r\n', b'\r\0\n', b'\r\n\0', b'\0\n', b'\n\0', b'\r\0', b'\0\r',
         b'\0', b'', b' \r\n', b'\r \n', b'\x0b', b'\x0c', b'\x1a', b'\x85',
         b'\xe2\x80\xa8')
# Those whose tricks are also sent in small pieces.
_PLAIN_ENDS = (b'\r\n', b'\n', b'\r', b'\r\r\n', b'\n\r')


def tricks():
    """All that might end a message: (bytes, to be sent in pieces)."""
    for before, after in itertools.product(_ENDS, _ENDS):
        plain = before in _PLAIN_ENDS and after in _PLAIN_ENDS
        for dot in (b'.', b'..', b'.\0', b'\0.'):
            trick = before + dot + after
            if b'\r\n.\r\n' in trick or (not before and not after):
                continue        # this one really ends it, or nothing at all
            if b'\0' in dot and not plain:
                continue
            yield trick, plain and b'\0' not in dot


def smuggling_message(key, trick):
    """A message with a second one behind the trick, as it is sent."""
    return (b'From: <author@example.test>\r\n'
            b'Subject: honest\r\n'
            b'Message-ID: <%s@example.test>\r\n'
            b'\r\n'
            b'before' % key + trick
            + b'MAIL FROM:<smuggler@example.test>\r\n'
            b'RCPT TO:<smuggled@example.test>\r\n'
            b'DATA\r\n'
            b'From: <smuggler@example.test>\r\n'
            b'Subject: smuggled\r\n'
            b'Message-ID: <smuggled-%s@example.test>\r\n'
            b'\r\n'
            b'smuggled' % key)


def lines_received(wire):
    """The lines in wire, any line end for one, empty ones left out.

    Dots are taken off as a server does it for which only CRLF ends a line.
    """
    content = re.sub(rb'(\A|\r\n)\.', rb'\1', wire)
    return [line for line in re.split(rb'[\r\n]+', content) if line]


def cut(wire, at, length, how):
    """The pieces in which a message is sent; the trick is at `at`."""
    if how == 'whole':
        return [wire]
    if how == 'bytes':
        low, high = at - 1, at + length + 1
        return ([wire[:low]]
                + [wire[i:i + 1] for i in range(low, high)] + [wire[high:]])
    return [wire[:how], wire[how:]]


def wait_read(pid):
    """Wait until the process has read all that was sent to it so far.

    What is sent over loopback has arrived, and has woken its reader, when
    send() returns; the proxy has one thread and sleeps when it has read
    everything there is.
    """
    end = time.monotonic() + 20
    while True:
        with open('/proc/%d/stat' % pid) as f:
            if f.read().rpartition(')')[2].split()[0] == 'S':
                return
        assert time.monotonic() < end, 'the proxy is busy and stays so'
        os.sched_yield()


def send_smuggling(session, pieces, pid=None):
    """Send one message of the corpus; the codes of MAIL, RCPT, DATA, end.

    Between two pieces the server, process `pid`, reads what it has got.
    """
    codes = [session.command(c)[0] for c in (
        'MAIL FROM:<author@example.test>', 'RCPT TO:<recipient@example.test>',
        'DATA')]
    for piece in pieces[:-1]:
        session.send(piece)
        wait_read(pid)
    session.send(pieces[-1] + b'\r\n.\r\n')
    codes.append(session.reply()[0])
    return codes


def smuggling_is_possible(postfix):
    """Without a proxy, Postfix falls for some of the tricks."""
    caught = []
    for trick in (b'\n.\n', b'\n.\r\n', b'\r\n.\n'):
        postfix.clear()
        with Session(postfix.port) as session:
            send_smuggling(session, [smuggling_message(b'canary', trick)])
        if any(m.sender == 'smuggler@example.test'
               for m in postfix.wait_idle()):
            caught.append(trick)
    assert caught, 'this Postfix sees through all of them'
    return 'it takes %s for an end' % ' and '.join(map(repr, caught))


def smuggling_corpus(postfix, program):
    postfix.clear()
    sent = {}
    with Proxy(program, postfix.port) as proxy:
        def send_all(work):
            with Session(proxy.port) as session:
                for key, pieces, trick in work:
                    codes = send_smuggling(session, pieces,
                                           proxy.process.pid)
                    assert codes == [250, 250, 354, 250], \
                        '%r answered %s' % (trick, codes)
                session.quit()

        work = []
        for trick, in_pieces in tricks():
            hows = ['whole']
            if in_pieces:
                at = smuggling_message(b'k', trick).index(b'before') + 6
                hows += ['bytes'] + list(range(at, at + len(trick) + 1))
            for how in hows:
                key = b'trick-%d' % len(sent)
                wire = smuggling_message(key, trick)
                at = wire.index(b'before') + len(b'before')
                if isinstance(how, int):
                    how += len(key) - 1     # the key above has one byte
                work.append((key, cut(wire, at, len(trick), how), trick))
                sent[key] = (wire, trick, how)
        in_threads(send_all, [work[i::8] for i in range(8)])
    found = collections.Counter()
    for message in postfix.wait_idle():
        assert message.sender == 'author@example.test', \
            'smuggled: %r' % message.raw
        match = re.search(rb'^Message-ID: <([^@>]+)@', message.content, re.M)
        key = match.group(1)
        found[key] += 1
        wire, trick, how = sent[key]
        got = [line for line in message.content.split(b'\n')
               if line and line != b'X-Peer: 127.0.0.1']
        assert got == lines_received(wire), '%r sent %s arrived as %r' % (
            trick, how, message.content)
    for key, (wire, trick, how) in sent.items():
        assert found[key] == 1, \
            '%r sent %s arrived %d times' % (trick, how, found[key])
    return '%d messages' % len(sent)


def in_threads(function, arguments):
    errors = []

    def run(argument):
        try:
            function(argument)
        except Exception as e:
            errors.append(e)
    threads = [threading.Thread(target=run, args=(a,), daemon=True)
               for a in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
        assert not thread.is_alive(), 'timed out'
    if errors:
        raise errors[0]


def part_smuggle(results, args):
    with Postfix() as postfix:
        results.run('smuggling without a proxy', smuggling_is_possible,
                    postfix)
        results.run('smuggling through PureProxy', smuggling_corpus,
                    postfix, args.smtpd)


# ---------------------------------------------------------------------------
# Mailman.

def list_message(mailfrom, to, key, subject='hello', body=b'text\n',
                 head=b''):
    return (('From: <%s>\nTo: <%s>\nSubject: %s\n'
             'Message-ID: <%s@example.test>\n'
             'Date: Sat, 01 Jan 2022 00:00:00 +0000\n'
             % (mailfrom, to, subject, key)).encode() + head + b'\n' + body)


class MailmanCases:
    """The cases of the part; they share one Mailman, one upstream."""

    def __init__(self, mailman, out, postfix, proxy):
        self.mailman = mailman
        self.out = out              # where Mailman's own mail goes
        self.postfix = postfix
        self.proxy = proxy
        self.keys = ('key-%d' % i for i in itertools.count())

    def send(self, rcpttos, mailfrom='first@subscriber.example.test',
             timeout=30, content=None, **how):
        """Send one message; forget what arrived before.  (key, Outcome)"""
        self.out.clear()
        self.postfix.clear()
        key = next(self.keys)
        if content is None:
            content = list_message(mailfrom, rcpttos[0], key, **how)
        with Session(self.proxy.port, timeout) as session:
            outcome = session.mail(mailfrom, rcpttos, stuffed(content[:-1]))
            session.quit()
        return key, outcome, content

    def accepted(self, rcpttos, **how):
        key, outcome, content = self.send(rcpttos, **how)
        assert outcome.code == 250 and outcome.rcpts == [250] * len(rcpttos), \
            str(outcome)
        return key, content

    def wait_out(self, rcpt, text):
        """Wait for Mailman's mail to rcpt that has this text in it."""
        def there(messages):
            return [m for m in messages
                    if rcpt in m.rcpttos and text in m.content]
        return there(self.out.wait_for(
            there, what='mail from Mailman to %s' % rcpt))[0]

    def at(self, local):
        return '%s@%s' % (local, Mailman.DOMAIN)

    def check_post(self, name, key):
        for subscriber in Mailman.LISTS[name]:
            message = self.wait_out(subscriber, key.encode())
            assert message.mailfrom.startswith(name + '-bounces@'), \
                message.mailfrom

    def nothing_upstream(self):
        assert not self.postfix.wait_idle(), 'it went upstream as well'

    def post(self, name):
        key, _ = self.accepted([self.at(name)])
        self.check_post(name, key)
        self.nothing_upstream()

    def post_in_capitals(self):
        key, _ = self.accepted(['DEV@' + Mailman.DOMAIN.upper()])
        self.check_post('dev', key)
        self.nothing_upstream()

    def post_to_both(self):
        key, _ = self.accepted([self.at('dev'), self.at('my-list')])
        self.check_post('dev', key)
        self.check_post('my-list', key)
        self.nothing_upstream()

    def without_from_and_date(self):
        self.accepted([self.at('dev')], content=(
            b'Subject: bare\nMessage-ID: <bare@example.test>\n\nbare\n'))
        message = self.wait_out(Mailman.LISTS['dev'][0],
                                b'<bare@example.test>')
        for name in (b'From', b'Date'):
            assert re.search(rb'^%s: ..' % name, message.content, re.M), \
                'no %s: %r' % (name, message.content)

    def command(self, address, mailfrom, subject, text):
        self.accepted([self.at(address)], mailfrom=mailfrom, subject=subject)
        message = self.wait_out(mailfrom, text)
        self.nothing_upstream()
        return message

    def confirm(self):
        """Somebody new joins and answers Mailman's question."""
        new = 'new@subscriber.example.test'
        message = self.command('dev-join', new, '', b'confirm ')
        token = re.search(rb'^From: (dev-confirm\+[0-9a-f]+)@',
                          message.content, re.M).group(1).decode()
        self.accepted([self.at(token)], mailfrom=new,
                      subject='Re: Your confirmation is needed')
        members = []

        def joined():
            members[:] = [e['email'] for e in self.mailman.rest(
                'lists/%s/roster/member' % self.at('dev'))['entries']]
            return new in members
        wait_until(joined, 20, 'the new subscriber among %s' % members)

    def to_owner(self, address):
        self.accepted([self.at(address)], body=b'for the owner\n')
        self.wait_out(Mailman.OWNER, b'for the owner')
        self.nothing_upstream()

    def upstream(self, rcpt):
        """What is no list of this Mailman goes upstream as it is."""
        _, content = self.accepted([rcpt])
        message, = self.postfix.wait_for(1)
        assert message.recipient == rcpt, message.recipient
        same(message.content, content)
        assert not self.out.messages, self.out.messages

    def mixed(self):
        """A list, one of its addresses and others, in one message."""
        others = ['recipient@example.test', self.at('nosuch')]
        key, content = self.accepted(
            [others[0], self.at('dev'), others[1], self.at('dev-owner')])
        self.check_post('dev', key)
        self.wait_out(Mailman.OWNER, key.encode())
        self.postfix.wait_for(2)
        got = self.postfix.wait_idle()
        assert sorted(m.recipient for m in got) == sorted(others), got
        for message in got:
            same(message.content, content)

    def refused_upstream(self):
        """Upstream refuses its recipient; the list gets the message."""
        key, outcome, _ = self.send(
            [self.at('dev'), 'recipient@refused.test'])
        assert outcome.rcpts[0] == 250 and 550 <= outcome.rcpts[1] <= 559, \
            str(outcome)
        assert outcome.code == 250, str(outcome)
        self.check_post('dev', key)

    def defective(self, head, body):
        """Mailman gives one reply for all of the recipients: no waiting."""
        _, outcome, _ = self.send([self.at('dev'), self.at('my-list')],
                                  timeout=15, head=head, body=body)
        assert 400 <= outcome.code <= 599, str(outcome)
        assert not self.out.messages, self.out.messages
        self.post('dev')
        return '%s %s' % (outcome.code, outcome.text)

    def stopped(self):
        """While Mailman is away its lists get 451, the others their mail."""
        self.mailman.stop()
        _, outcome, _ = self.send([self.at('dev')])
        assert outcome.code == 451, str(outcome)
        self.upstream('recipient@example.test')
        _, outcome, content = self.send(
            ['recipient@example.test', self.at('dev')])
        codes = outcome.rcpts + [outcome.code]
        assert codes == [250, 451, 250] or codes[-1] == 451, str(outcome)
        if outcome.code == 250:
            message, = self.postfix.wait_for(1)
            same(message.content, content)
        self.mailman.start()
        self.post('dev')
        return str(codes)


def part_mailman(results, args):
    with RecordingSink() as out, \
            Mailman((out.host, out.port)) as mailman, \
            Postfix(domains=('example.test', Mailman.DOMAIN)) as postfix, \
            Proxy(args.smtpd, postfix.port, '-c', 'MailmanProxy',
                  '--mailman-lists', mailman.lists_dir,
                  '--mailman-lmtp', mailman.address) as proxy:
        cases = MailmanCases(mailman, out, postfix, proxy)

        def run(name, case, *arguments):
            results.run('Mailman: ' + name, case, *arguments)
        someone = 'someone@subscriber.example.test'
        member = Mailman.LISTS['dev'][0]
        run('a post', cases.post, 'dev')
        run('a post to a list with a dash', cases.post, 'my-list')
        run('a post in capitals', cases.post_in_capitals)
        run('a post to two lists', cases.post_to_both)
        run('a post without From and Date', cases.without_from_and_date)
        for name in ('dev', 'my-list'):
            run(name + '-request is answered', cases.command,
                name + '-request', someone, 'help', b'email command')
            run(name + '-join is answered', cases.command,
                name + '-join', someone, '', b'confirm')
        run('-leave is answered', cases.command, 'dev-leave', member,
            '', b'unsubscri')
        run('-subscribe is answered', cases.command, 'my-list-subscribe',
            'other@subscriber.example.test', '', b'confirm')
        run('joining and its confirmation', cases.confirm)
        run('-owner', cases.to_owner, 'dev-owner')
        run('-admin', cases.to_owner, 'dev-admin')
        run('-admin of a list with a dash', cases.to_owner, 'my-list-admin')
        run('an unknown list goes upstream', cases.upstream,
            cases.at('nosuch'))
        run('an unknown list\'s -request goes upstream', cases.upstream,
            cases.at('nosuch-request'))
        run('an unknown command goes upstream', cases.upstream,
            cases.at('dev-nosuch'))
        run('a list\'s name in another domain goes upstream', cases.upstream,
            'dev@example.test')
        run('lists and others in one message', cases.mixed)
        run('a recipient refused upstream', cases.refused_upstream)
        run('defective MIME for two lists', cases.defective,
            b'Content-Type: multipart/mixed; boundary=none\n', b'no parts\n')
        run('a line too long for two lists', cases.defective,
            b'', b'x' * 2000 + b'\n')
        run('Mailman stopped', cases.stopped)


# ---------------------------------------------------------------------------

PARTS = collections.OrderedDict((
    ('postfix', part_postfix), ('restart', part_restart),
    ('exim', part_exim), ('sink', part_sink), ('smuggle', part_smuggle),
    ('mailman', part_mailman)))


def main():
    parser = argparse.ArgumentParser(
        description='The proxies with real mail servers.')
    parser.add_argument('smtpd')
    parser.add_argument('--no-skip', action='store_true',
                        default=bool(os.environ.get('NO_SKIP')))
    parser.add_argument('--only', metavar='PART', action='append',
                        choices=list(PARTS))
    parser.add_argument('--messages', type=int, default=1000,
                        help='for postfix and restart')
    args = parser.parse_args()
    args.smtpd = os.path.abspath(args.smtpd)
    terminate_on_signal()
    results = Results(args.no_skip)
    for name, part in PARTS.items():
        if args.only and name not in args.only:
            continue
        try:
            part(results, args)
        except MissingTool as e:
            results.skip(name, e)
        except Exception as e:
            results.fail(name, '%s: %s' % (type(e).__name__, e))
    return results.close()


if __name__ == '__main__':
    sys.exit(main())

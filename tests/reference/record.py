#!/usr/bin/env python3
"""Record the conversations that CPython 3.11's own smtpd holds, or check those on file.

    record.py [--check] [NAME ...]    run every scenario again, fail on any difference
    record.py --update [NAME ...]     run them and write down what CPython said

README.md beside this file describes the format.  CPython's server runs in this very process,
on a loopback socket, one poll() at a time; a step is over when the server has read every byte
that was sent, the client has read every byte that the server sent, and nothing is queued.  So
no step waits for a clock.
"""

import argparse
import copy
import fcntl
import pathlib
import re
import socket
import struct
import sys
import termios
import time
import warnings

if sys.version_info[:2] != (3, 11):
    sys.exit('record.py needs Python 3.11, the version that the port follows')
warnings.simplefilter('ignore', DeprecationWarning)
import asyncore  # noqa: E402
import smtpd     # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
FQDN = 'mx.example.net'
LONGEST_SEND = 32768     # so that one send arrives as one recv()
PATIENCE = 20            # seconds until a step counts as stuck
PLACEHOLDERS = {'fqdn': FQDN.encode(), 'version': smtpd.__version__.encode()}
MODES = ('split', 'joined')


# ---------------------------------------------------------------------------------------------
# Text to bytes and back

SHORT = {0x0d: '\\r', 0x0a: '\\n', 0x09: '\\t', 0x5c: '\\\\', 0x7b: '\\{', 0x7d: '\\}'}
LONG = {v[1]: bytes([k]) for k, v in SHORT.items()}


def unescape(text):
    """Bytes that the text stands for; ValueError if it is not well formed."""
    out, i = b'', 0
    while i < len(text):
        c = text[i]
        if c == '\\':
            if text[i + 1:i + 2] == 'x':
                out += bytes([int(text[i + 2:i + 4], 16)])
                i += 4
                continue
            out += LONG[text[i + 1]]
            i += 2
        elif c == '{':
            end = i + 1
            while text[end] != '}':
                end += 2 if text[end] == '\\' else 1
            inner = text[i + 1:end]
            if inner in PLACEHOLDERS:
                out += PLACEHOLDERS[inner]
            else:
                what, count = inner.rsplit('*', 1)
                out += unescape(what) * int(count)
            i = end + 1
        else:
            out += c.encode()
            i += 1
    return out


def escape(data, compact=True):
    """The text for some bytes: UTF-8 where it can be seen, \\xNN where not."""
    out = ''
    for c in data.decode('utf-8', 'surrogateescape'):
        if ord(c) in SHORT:
            out += SHORT[ord(c)]
        elif 0xdc80 <= ord(c) <= 0xdcff or not c.isprintable():
            out += ''.join('\\x%02x' % b for b in c.encode('utf-8', 'surrogateescape'))
        else:
            out += c
    if out.endswith(' '):
        out = out[:-1] + '\\x20'
    if not compact:
        return out
    return re.sub(r'([^\\{}])\1{23,}', lambda m: '{%s*%d}' % (m[1], len(m[0])), out)


def lines_of(data):
    """Bytes as escaped lines, each ending after its LF; equal neighbours folded."""
    folded = []
    for line in re.findall(rb'[^\n]*\n|[^\n]+', data):
        if folded and folded[-1][0] == line:
            folded[-1][1] += 1
        else:
            folded.append([line, 1])
    for line, count in folded:
        if count < 4:
            for _ in range(count):
                yield escape(line)
        else:
            yield '{%s*%d}' % (escape(line, compact=False), count)


def said_lines(data):
    for line in lines_of(data):
        for name, value in PLACEHOLDERS.items():
            line = line.replace(value.decode(), '{%s}' % name)
        yield line


# ---------------------------------------------------------------------------------------------
# Scenarios

class Answer:
    """What a server did after one client event: messages handed over, bytes, and an ending."""

    def __init__(self):
        self.messages = []
        self.said = b''
        self.end = ''        # 'EOF', 'EOF SomeError', 'loop left'

    def __eq__(self, other):
        return (self.messages, self.said, self.end) == (other.messages, other.said, other.end)

    def lines(self, python=False):
        p = 'P' if python else ''
        for message in self.messages:
            yield from message_lines(p + 'M', message)
        s = 'P:' if python else 'S:'
        said = list(said_lines(self.said)) + (['{%s}' % self.end] if self.end else [])
        for line in said:
            yield '%s %s' % (s, line)
        if not said and not self.messages and python:
            yield s


def message_lines(m, message):
    yield '%s from: %s' % (m, escape(message['from']))
    for rcpt in message['to']:
        yield '%s to: %s' % (m, escape(rcpt))
    for key in ('mail_options', 'rcpt_options'):
        if message[key]:
            yield '%s %s: %s' % (m, key, escape(' '.join(message[key]).encode()))
    for line in list(lines_of(message['data'])) or ['']:
        yield ('%s data: %s' % (m, line)).rstrip()


class Step:
    """A client event and both answers to it.  The first step of a scenario is the connection."""

    def __init__(self, source=None, event=None):
        self.source = source or []       # the lines as written, comments included
        self.event = event               # bytes, or ('close',), ('visitor', bytes) ...
        self.ours = Answer()
        self.python = None               # None: the same as ours


class Scenario:
    def __init__(self, name):
        self.name = name
        self.before = []                 # comment lines above the name
        self.head = []                   # comment, title and option lines as written
        self.options = {}
        self.process_message = 'None'
        self.deviation = []
        self.also = None                 # modes in which CPython gives the same answers
        self.ours_also = None            # the same for the port, where a deviation changes it
        self.steps = [Step()]

    def text(self):
        out = self.before + ['== ' + self.name] + self.head
        if self.also is not None:
            out.append('also: ' + (' '.join(self.also) or '-'))
        if self.ours_also is not None:
            out.append('ours also: ' + (' '.join(self.ours_also) or '-'))
        for step in self.steps:
            out += step.source
            if step.python is not None and step.python != step.ours:
                out += step.python.lines(python=True)
                out += list(step.ours.lines()) or ['S:']
            else:
                out += step.ours.lines()
        return '\n'.join(out) + '\n'


OPTIONS = {'data_size_limit', 'enable_SMTPUTF8', 'decode_data'}
EVENTS = ('shutdown_wr', 'close', 'rst')


def parse_event(text):
    if text in ('{%s}' % e for e in EVENTS):
        return (text[1:-1],)
    if text.startswith('{visitor'):
        return ('visitor', unescape(text[8:-1].lstrip(' ')))
    return unescape(text)


def parse_option(scenario, key, value):
    if key == 'server':
        for word in value.split():
            name, _, number = word.partition('=')
            if name not in OPTIONS:
                raise ValueError('unknown option ' + name)
            constants = {'': True, 'None': None}
            scenario.options[name] = constants[number] if number in constants else int(number)
    elif key == 'process_message':
        scenario.process_message = value
    elif key == 'deviation':
        scenario.deviation = value.split(', ')
        unknown = set(scenario.deviation) - deviations()
        if unknown:
            raise ValueError('no such deviation in README.md: %s' % unknown)
    elif key == 'also':
        scenario.also = [m for m in value.split() if m != '-']
    elif key == 'ours also':
        scenario.ours_also = [m for m in value.split() if m != '-']
    elif key != 'title':
        raise ValueError('unknown line ' + key)


def answer_line(step, kind, field, value):
    """One S:, P:, M or PM line of the step."""
    if kind.startswith('P') and step.python is None:
        step.python = Answer()
    answer = step.python if kind.startswith('P') else step.ours
    if kind.endswith('M'):
        if field == 'from':
            answer.messages.append({'from': unescape(value), 'to': [], 'mail_options': [],
                                    'rcpt_options': [], 'data': b''})
        message = answer.messages[-1]
        if field == 'to':
            message['to'].append(unescape(value))
        elif field == 'data':
            message['data'] += unescape(value)
        elif field != 'from':
            message[field] = unescape(value).decode().split(' ')
    elif re.fullmatch(r'\{(EOF( \w+)?|loop left)\}', value):
        answer.end = value[1:-1]
    else:
        answer.said += unescape(value)


def parse(path):
    """The comment lines before the first scenario, and the scenarios of one file."""
    preface, scenarios, pending = [], [], []
    for number, line in enumerate(path.read_text(encoding='utf-8').split('\n'), 1):
        try:
            if line.startswith('== '):
                scenarios.append(Scenario(line[3:]))
                scenarios[-1].before, pending = pending, []
            elif line.startswith('#'):
                pending.append(line)
            elif not scenarios:
                preface, pending = preface + pending, []
            elif line:
                parse_line(scenarios[-1], line, pending)
                pending = []
        except (ValueError, KeyError, IndexError) as error:
            sys.exit('%s:%d: %s: %r' % (path.name, number, line, error))
    return preface, scenarios


def parse_line(scenario, line, comments):
    m = re.fullmatch(r'(C:|C\+|S:|P:|M \w+:|PM \w+:)(?: (.*))?', line)
    if not m:
        key, _, value = line.partition(': ')
        parse_option(scenario, key, value)
        if key not in ('also', 'ours also'):
            scenario.head += comments + [line]
    elif m[1] == 'C:':
        scenario.steps.append(Step(comments + [line], parse_event(m[2])))
    elif m[1] == 'C+':
        scenario.steps[-1].event += unescape(m[2])
        scenario.steps[-1].source.append(line)
    else:
        kind, _, field = m[1].rstrip(':').partition(' ')
        answer_line(scenario.steps[-1], kind, field, m[2] or '')
    event = scenario.steps[-1].event
    if isinstance(event, bytes) and len(event) > LONGEST_SEND:
        raise ValueError('longer than %d bytes' % LONGEST_SEND)


def deviations():
    """The deviations' short names, from the table in README.md."""
    text = (HERE / 'README.md').read_text(encoding='utf-8')
    return set(re.findall(r'^\| `([a-z0-9-]+)` \|', text, re.M))


# ---------------------------------------------------------------------------------------------
# CPython's server, watched

class Channel(smtpd.SMTPChannel):
    def __init__(self, server, conn, *args, **kwargs):
        no_delay(conn)
        self.bytes_read = self.bytes_sent = 0
        self.error = None
        server.channels.append(self)
        super().__init__(server, conn, *args, **kwargs)

    def recv(self, size):
        data = super().recv(size)
        self.bytes_read += len(data)
        return data

    def send(self, data):
        count = super().send(data)
        self.bytes_sent += count
        return count

    def handle_error(self):
        self.error = sys.exc_info()[0].__name__
        super().handle_error()

    def log_info(self, message, type='info'):
        pass


def no_delay(sock):
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def to_bytes(value):
    return value if isinstance(value, bytes) else value.encode('utf-8', 'surrogateescape')


class Server(smtpd.SMTPServer):
    channel_class = Channel

    def __init__(self, scenario, fds):
        options = dict(scenario.options)
        super().__init__(('127.0.0.1', 0), None, map=fds, **options)
        self.channels = []
        self.messages = []
        self.behaviour = scenario.process_message

    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        self.messages.append({
            'from': to_bytes(mailfrom), 'to': [to_bytes(r) for r in rcpttos],
            'mail_options': list(kwargs.get('mail_options', [])),
            'rcpt_options': list(kwargs.get('rcpt_options', [])), 'data': to_bytes(data)})
        kind, _, what = self.behaviour.partition(' ')
        if kind == 'base':
            super().process_message(peer, mailfrom, rcpttos, data, **kwargs)
        elif kind == 'throw':
            raise {'ExitNow': asyncore.ExitNow, 'SystemExit': SystemExit}.get(what, ValueError)(what)
        elif kind == 'int':
            return int(what)
        elif kind == 'return':
            return unescape(what[1:-1]).decode()
        return None


class Client:
    def __init__(self, server):
        self.sent = self.got = 0
        self.socket = socket.create_connection(server.socket.getsockname())
        no_delay(self.socket)
        self.socket.setblocking(False)
        self.open = True

    def read(self):
        """Everything that has arrived, and whether that was the end."""
        data = b''
        try:
            while True:
                part = self.socket.recv(1 << 16)
                if not part:
                    return data, True
                data += part
                self.got += len(part)
        except BlockingIOError:
            return data, False
        except ConnectionError:
            return data, True


class Session:
    """One client, one server, one map."""

    def __init__(self, scenario):
        self.map = {}
        self.server = Server(scenario, self.map)
        self.client, self.channel, self.left = None, None, False

    def spin(self, done):
        limit = time.monotonic() + PATIENCE
        while not done():
            if time.monotonic() > limit:
                raise RuntimeError('stuck')
            asyncore.poll(0.0, self.map)

    def connect(self):
        before = len(self.server.channels)
        client = Client(self.server)
        self.spin(lambda: len(self.server.channels) > before)
        return client, self.server.channels[-1]

    def alive(self, channel):
        return self.map.get(channel._fileno) is channel

    def settle(self, client, channel, answer, until_closed=False):
        """Let the server work until neither side has anything left to do."""
        ended = False

        def quiet():
            nonlocal ended
            data, end = client.read()
            answer.said += data
            ended = ended or end
            if not self.alive(channel):
                return ended
            return (channel.bytes_read == client.sent and client.got == channel.bytes_sent
                    and not channel.producer_fifo and not until_closed)
        self.spin(quiet)
        if ended:
            client.open = False
            answer.end = 'EOF' + (' ' + channel.error if channel.error else '')

    def send(self, client, channel, data):
        """Hand the bytes to the server's side of the connection, all of them before it reads."""
        try:
            client.socket.sendall(data)
        except ConnectionError:
            return
        client.sent += len(data)
        limit = time.monotonic() + PATIENCE
        while self.alive(channel):
            waiting = fcntl.ioctl(channel.socket, termios.FIONREAD, b'\0' * 4)
            if struct.unpack('i', waiting)[0] == len(data):
                break
            if time.monotonic() > limit:
                raise RuntimeError('stuck: %d bytes sent, not all arrive' % len(data))

    def gone(self, client, channel):
        client.open = False
        self.spin(lambda: not self.alive(channel))

    def visitor(self, data):
        client, channel = self.connect()
        self.settle(client, channel, Answer())
        self.send(client, channel, data)
        self.settle(client, channel, Answer())
        client.socket.close()
        self.gone(client, channel)

    def act(self, event, answer):
        client, channel = self.client, self.channel
        if isinstance(event, bytes):
            for i in range(0, len(event), LONGEST_SEND):
                if client.open:
                    self.send(client, channel, event[i:i + LONGEST_SEND])
                    self.settle(client, channel, answer)
        elif event[0] == 'visitor':
            self.visitor(event[1])
        elif client.open and event[0] == 'shutdown_wr':
            client.socket.shutdown(socket.SHUT_WR)
            self.settle(client, channel, answer, until_closed=True)
        elif client.open:
            if event[0] == 'rst':
                linger = struct.pack('ii', 1, 0)
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.socket.close()
            self.gone(client, channel)

    def step(self, event):
        """The answer to one client event; None is the connection itself."""
        answer = Answer()
        if self.left:
            return answer
        try:
            if event is None:
                self.client, self.channel = self.connect()
                self.settle(self.client, self.channel, answer)
            else:
                self.act(event, answer)
        except (asyncore.ExitNow, SystemExit):
            self.left = True
            while self.client.got < self.channel.bytes_sent:
                answer.said += self.client.read()[0]
            answer.end = 'loop left'
        answer.messages, self.server.messages = self.server.messages, []
        return answer

    def close(self):
        if self.client:
            self.client.socket.close()
        asyncore.close_all(self.map)


def run(scenario, events):
    session = Session(scenario)
    try:
        return [session.step(event) for event in [None] + events]
    except RuntimeError as error:
        sys.exit('%s: %s' % (scenario.name, error))
    finally:
        session.close()


# ---------------------------------------------------------------------------------------------
# The three ways to replay

def split(events):
    for event in events:
        if isinstance(event, bytes):
            yield from (event[i:i + 1] for i in range(len(event)))
        else:
            yield event


def joined(events):
    out = []
    for event in events:
        if out and isinstance(event, bytes) and isinstance(out[-1], bytes):
            out[-1] += event
        else:
            out.append(event)
    return out


def total(answers):
    whole = Answer()
    for answer in answers:
        whole.messages += answer.messages
        whole.said += answer.said
        whole.end = whole.end or answer.end
    return whole


def record(scenario):
    """The scenario as CPython plays it."""
    result = copy.deepcopy(scenario)
    events = [step.event for step in scenario.steps[1:]]
    answers = run(scenario, events)
    for step, answer in zip(result.steps, answers):
        if scenario.deviation:
            step.python = answer
        else:
            step.ours, step.python = answer, None
    whole = total(answers)
    result.also = [mode for mode, way in zip(MODES, (split, joined))
                   if total(run(scenario, list(way(events)))) == whole]
    return result


def complaints(scenario, recorded):
    if recorded.text() != scenario.text():
        yield 'CPython says something else:\n' + difference(scenario.text(), recorded.text())
    deviates = recorded.ours_also is not None or any(
        s.python is not None and s.python != s.ours for s in recorded.steps)
    if scenario.deviation and not deviates:
        yield 'names a deviation, but nothing deviates'


def difference(old, new):
    import difflib
    return '\n'.join(list(difflib.unified_diff(old.split('\n'), new.split('\n'),
                                               'on file', 'now', lineterm='', n=2)))


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument('--check', action='store_true', help='the default')
    arguments.add_argument('--update', action='store_true')
    arguments.add_argument('names', nargs='*')
    args = arguments.parse_args()
    socket.getfqdn = lambda name='': FQDN
    seen, failed, count = set(), 0, {m: 0 for m in MODES + ('deviation',)}
    for path in sorted((HERE / 'conversations').glob('*.txt')):
        preface, scenarios = parse(path)
        for i, scenario in enumerate(scenarios):
            if scenario.name in seen:
                sys.exit('%s: the name %s is taken' % (path.name, scenario.name))
            seen.add(scenario.name)
            if args.names and scenario.name not in args.names:
                continue
            recorded = record(scenario)
            found = list(complaints(scenario, recorded))
            if not args.update and found:
                failed += 1
                print('%s: %s: %s' % (path.name, scenario.name, '\n'.join(found)))
            scenarios[i] = recorded
            for key in recorded.also + (['deviation'] if scenario.deviation else []):
                count[key] += 1
        if args.update:
            text = '\n'.join(preface).rstrip('\n') + '\n\n' + '\n'.join(s.text() for s in scenarios)
            path.write_text(text, encoding='utf-8')
    print('%d scenarios; the same byte by byte: %d, all at once: %d; with a deviation: %d; failed: %d'
          % (len(seen), count['split'], count['joined'], count['deviation'], failed))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())

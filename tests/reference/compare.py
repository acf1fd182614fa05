#!/usr/bin/env python3
"""Compare the C++ smtpd with CPython's own, live, in random SMTP sessions.

    compare.py [--sessions N] [--seed S] [--jobs J] [--recorder PATH]
    compare.py --seed S --only I      show session I of that seed

Each session is a list of events: a client connects, sends a chunk of bytes, closes one side or
both.  The bytes come from a grammar of valid, nearly valid and hostile SMTP.  Three servers get
the same events and the same chunks, and after each event have said all that they will say:

    C++        the recorder (tests/recorder.cpp), replaying over socketpairs with --driver
    CPython    smtpd.SMTPChannel of the Python that runs this script, unmodified
    decided    the same class of CPython, with the rows of the Deviations table laid
               over it: the class `Decided` below is the whole list of what we do otherwise

Replies, closed connections and delivered messages are compared byte for byte after every event;
only the banner's version is normalised.  Two things must hold for each event:

  * C++ and decided are the same, always;
  * CPython and decided are the same, hidden state included, unless a row applied to this very
    event.  Then they agree up to the byte where it applied, and CPython's side starts again
    from the state that the row prescribes: the mail goes on, and nothing after it is masked.

So where no row applies, the port is compared with CPython itself.  In addition each session is
replayed with its chunks joined, and, when it is short, byte by byte: the port must answer the
same.  With --tcp N, N more sessions go over TCP to the recorder as a running server.

The exit status is 0 when nothing differs, every reply text of smtpd was seen, every row applied
and half of the sessions delivered a message; 77 without a Python 3.11.
"""

import argparse
import ast
import codecs
import collections
import fcntl
import importlib.util
import inspect
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import warnings

if sys.version_info[:2] != (3, 11):
    system = '/usr/bin/python3'
    if os.path.exists(system) and os.path.realpath(system) != os.path.realpath(sys.executable):
        os.execv(system, [system, *sys.argv])
    print('skipped: this needs Python 3.11, the version that the port follows')
    sys.exit(1 if os.environ.get('NO_SKIP') else 77)
warnings.simplefilter('ignore', DeprecationWarning)
import asynchat   # noqa: E402
import asyncore   # noqa: E402
import smtpd      # noqa: E402

FQDN = 'mx.example.net'
BATCH = 100            # sessions given to one run of the recorder
STUCK = 60             # seconds until that run counts as stuck
DEFAULT_LIMIT = smtpd.DATA_SIZE_DEFAULT

socket.getfqdn = lambda *name: FQDN
sys.setrecursionlimit(20000)   # a line of 500 '(' is no reason for CPython's parser to give up

ROWS = {
    'malformed-address': 'malformed address, bare SIZE, non-ASCII digits or letters in parameters',
    'command-bytes': 'bytes that are not UTF-8 in a command; a non-ASCII verb',
    'encoded-words': 'RFC 2047 words in an address',
    'control-characters': 'control characters in an address or parameter',
    'too-much-data': 'over data_size_limit',
    'lone-dot': '`.` CRLF straight after 354',
    'after-quit': 'commands after QUIT in the same packet',
    'hook-throws': 'process_message throws',
    'no-reply': 'what process_message returns is no reply',
    'per-channel-limits': 'command_size_limits',
    'options-and-utf8-status': 'mail_options, rcpt_options after a refusal; UTF-8 status text',
    'split-utf8': 'decode_data and UTF-8 split between packets, or invalid',
    'recipient-cap': 'no recipient cap',
    'domain-literals': 'specials in a domain literal',
}

# Every reply text of smtpd.SMTPChannel, as the source has it, then what the rows add.
# check_texts() compares the first part with the source.
TEXTS = [
    '220 %s %s', '221 Bye', '250 OK', '250 %s', '250-%s', '250-SIZE %s', '250-8BITMIME',
    '250-SMTPUTF8', '250 HELP',
    '250 Supported commands: EHLO HELO MAIL RCPT DATA RSET NOOP QUIT VRFY',
    '501 Supported commands: EHLO HELO MAIL RCPT DATA RSET NOOP QUIT VRFY',
    '250 Syntax: EHLO hostname', '250 Syntax: HELO hostname',
    '250 Syntax: MAIL FROM: <address>', '250 Syntax: RCPT TO: <address>',
    '250 Syntax: DATA', '250 Syntax: RSET', '250 Syntax: NOOP', '250 Syntax: QUIT',
    '250 Syntax: VRFY <address>',
    '252 Cannot VRFY user, but will accept message and attempt delivery',
    '354 End data with <CR><LF>.<CR><LF>', '451 Internal confusion',
    '500 Error: bad syntax', '500 Error: line too long',
    '500 Error: command "%s" not recognized',
    '501 Error: BODY can only be one of 7BIT, 8BITMIME',
    '501 Error: SMTPUTF8 takes no arguments',
    '501 Syntax: EHLO hostname', '501 Syntax: HELO hostname',
    '501 Syntax: MAIL FROM: <address>', '501 Syntax: RCPT TO: <address>',
    '501 Syntax: DATA', '501 Syntax: RSET', '501 Syntax: NOOP', '501 Syntax: VRFY <address>',
    '502 Could not VRFY %s', '502 EXPN not implemented',
    '503 Duplicate HELO/EHLO', '503 Error: send HELO first', '503 Error: nested MAIL command',
    '503 Error: need MAIL command', '503 Error: need RCPT command',
    '552 Error: Too much mail data',
    '552 Error: message size exceeds fixed maximum message size',
    '555 MAIL FROM parameters not recognized or not implemented',
    '555 RCPT TO parameters not recognized or not implemented',
]
EXTENDED = ' [SP <mail-parameters>]'
TEXTS_WITH_PARAMETERS = [code + ' Syntax: ' + what + EXTENDED for code in ('250', '501')
                         for what in ('MAIL FROM: <address>', 'RCPT TO: <address>')]
NOT_PROCESSED = '451 Error: message not processed'
TOO_MANY = '452 Error: too many recipients'
NOT_UTF8 = '554 Error: message is not valid UTF-8'
OUR_TEXTS = [NOT_PROCESSED, TOO_MANY, NOT_UTF8]

# What process_message() may return; None, and '', are 250 OK.
STATUSES = ['250 fine', '550 no such user', '250-one\r\n250 two', 'hello', '250 déjà vu', '']


# ---------------------------------------------------------------------------------------------
# CPython, and CPython with the rows

def is_reply(text):
    lines = text.split('\r\n')
    marks = '-' * (len(lines) - 1) + ' '
    return all(re.fullmatch(r'[2-5]\d\d(%s[^\r\n]*)%s' % (mark, '?' if mark == ' ' else ''), line) and line[:3] == text[:3]
               for line, mark in zip(lines, marks))


class HookError(Exception):
    """What a process_message() that throws throws."""


class Refused(Exception):
    """Inside `Decided`: a row says that this command is malformed."""
    def __init__(self, row):
        super().__init__(row)
        self.row = row


def plain_parser():
    """A second copy of Python's address parser, in which no RFC 2047 word is one."""
    spec = importlib.util.find_spec('email._header_value_parser')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def get_encoded_word(value, terminal_type='vtext'):
        raise module.errors.HeaderParseError('encoded words are text')

    module.get_encoded_word = get_encoded_word
    return module.get_addr_spec, module.get_angle_addr


CPYTHON_PARSER = smtpd.get_addr_spec, smtpd.get_angle_addr
PLAIN_PARSER = plain_parser()
CONTROL = re.compile('[\x00-\x08\x0a-\x1f\x7f]')   # TAB separates words, and may


def is_utf8(data):
    try:
        data.decode('utf-8')
    except UnicodeDecodeError:
        return False
    return True


class Ascii(str):
    """Text to whose methods non-ASCII letters and spaces mean nothing."""
    def upper(self):
        return Ascii(''.join(c.upper() if c.isascii() else c for c in self))

    def split(self):
        return [word for word in re.split('[ \t]', self) if word]


def unread(sock):
    """Bytes that a socket has received and nobody has read."""
    return struct.unpack('i', fcntl.ioctl(sock.fileno(), termios.FIONREAD, b'\0' * 4))[0]


class CPython(smtpd.SMTPChannel):
    """CPython's channel as it is; it only keeps its complaints to itself."""
    ignore_log_types = frozenset({'warning', 'error'})
    crash = None

    def handle_error(self):
        self.crash = '%s: %s' % sys.exc_info()[:2]
        super().handle_error()


class Decided(smtpd.SMTPChannel):
    """CPython's channel with the rows of the Deviations table.

    All that is not said here is CPython's own code.  fire() notes the row, and how much of this
    event's answer was CPython's before it applied.
    """
    ignore_log_types = frozenset({'warning', 'error'})
    crash = None

    def __init__(self, server, *args, **kwargs):
        self.fired = []
        self.said = 0              # bytes of replies since the event began
        self.held = None           # replies of a command whose fate is open
        self.in_message = False    # found_message() is under way
        self.swallow = 0           # bytes at the front of a message that are the DATA line's
        self.left = False          # QUIT was said
        self.decoder = codecs.getincrementaldecoder('utf-8')()
        # CPython shares this dict among all channels, and clears it for each new one.
        self.command_size_limits = collections.defaultdict(lambda: 512)
        server.shared_limits.clear()
        super().__init__(server, *args, **kwargs)

    def handle_error(self):
        self.crash = '%s: %s' % sys.exc_info()[:2]
        super().handle_error()

    def fire(self, row):
        self.fired.append((row, self.said))

    def push(self, msg):
        if self.held is not None:
            self.held.append(msg)
            return
        if self.in_message and not is_reply(msg):
            self.fire('no-reply')
            msg = NOT_PROCESSED
        if not msg.isascii() and not self.require_SMTPUTF8:
            self.fire('options-and-utf8-status')
        line = (msg + '\r\n').encode('utf-8')
        self.said += len(line)
        asynchat.async_chat.push(self, line)

    # Bytes stay bytes until a line or a message is complete.
    def collect_incoming_data(self, data):
        data, self.swallow = data[self.swallow:], 0
        if not data:
            return
        pieces = len(self.received_lines)
        decode, self._decode_data = self._decode_data, False
        super().collect_incoming_data(data)
        self._decode_data = decode
        if decode and len(self.received_lines) > pieces and not is_utf8(data):
            try:
                self.decoder.decode(b''.join(self.received_lines))
                row = 'split-utf8'
            except UnicodeDecodeError:
                row = 'command-bytes' if self.smtp_state == self.COMMAND else 'split-utf8'
            self.decoder.reset()
            self.fire(row)

    def found_terminator(self):
        if self.smtp_state == self.COMMAND:
            self.found_command()
        elif self.smtp_state == self.DATA:
            self.found_message()
        else:
            if self._decode_data:
                self.received_lines = []
            super().found_terminator()
        if self.left and (self.ac_in_buffer or self.connected and unread(self.socket)):
            self.fire('after-quit')
            self.ac_in_buffer = b''

    def readable(self):
        return not self.left

    def found_command(self):
        line, size = b''.join(self.received_lines), self.num_bytes
        verb = line.split(b' ')[0]
        reply = None
        shared_limits = self.smtp_server.shared_limits
        if size > 512 and self.command_size_limits.get('MAIL') != shared_limits.get('MAIL'):
            if not line.isascii():     # CPython keeps another part of it: perhaps half a character
                self.fire('per-channel-limits')
        if not is_utf8(line):
            too_long = size > self.max_command_size_limit
            reply = '500 Error: line too long' if too_long else '500 Error: bad syntax'
        elif not verb.isascii():
            limit = self.command_size_limit
            reply = '500 Error: line too long' if size > limit else '500 Error: bad syntax'
        if reply:
            self.received_lines, self.num_bytes = [], 0
            self.fire('command-bytes')
            self.push(reply)
            return
        if self.extended_smtp:
            verb = verb.decode().upper()
            own, shared = (limits.get(verb, 512) for limits in (self.command_size_limits, shared_limits))
            if (size > own) != (size > shared):
                self.fire('per-channel-limits')
        if self._decode_data:
            self.received_lines = [line.decode('utf-8')]
        super().found_terminator()

    def found_message(self):
        if self.swallow:
            self.swallow = 0
            self.fire('lone-dot')
        over = self.data_size_limit and self.num_bytes > self.data_size_limit
        if self._decode_data:
            message, self.received_lines = b''.join(self.received_lines), []
            if not over:
                if not is_utf8(message):
                    self.fire('split-utf8')
                    self._set_post_data_state()
                    self.push(NOT_UTF8)
                    return
                self.received_lines = [message.decode('utf-8')]
        self.in_message = True
        try:
            super().found_terminator()
        except HookError:
            self.fire('hook-throws')
            self._set_post_data_state()
            self.push(NOT_PROCESSED)
        self.in_message = False
        if over:
            self.fire('too-much-data')
            self._set_post_data_state()

    def _getaddr(self, arg):
        if CONTROL.search(arg):
            raise Refused('control-characters')
        if '=?' in arg and self.parsed(arg, CPYTHON_PARSER) != self.parsed(arg, PLAIN_PARSER):
            self.fire('encoded-words')
        smtpd.get_addr_spec, smtpd.get_angle_addr = PLAIN_PARSER
        try:
            address, rest = super()._getaddr(arg)
        finally:
            smtpd.get_addr_spec, smtpd.get_angle_addr = CPYTHON_PARSER
        if '\t' in str(address):
            raise Refused('control-characters')
        literal = re.fullmatch(r'(?:"(?:[^"\\]|\\.)*"|[^"@]*)@\[(.*)\]', str(address), re.S)
        if literal and set(literal[1]) & set('<>[]\\'):
            raise Refused('domain-literals')
        return address, Ascii(rest)

    def parsed(self, arg, parser):
        smtpd.get_addr_spec, smtpd.get_angle_addr = parser
        try:
            address, rest = super()._getaddr(arg)
            return str(address), str(rest)
        except Exception:
            return None
        finally:
            smtpd.get_addr_spec, smtpd.get_angle_addr = CPYTHON_PARSER

    def _getparams(self, params):
        if not all(param.isascii() for param in params):
            raise Refused('malformed-address')
        return super()._getparams(params)

    def carefully(self, method, arg, syntax):
        """Run CPython's method; what it can't read is a syntax error.  The replies wait."""
        self.held = []
        try:
            method(arg)
        except Exception as error:
            self.fire(error.row if isinstance(error, Refused) else 'malformed-address')
            extended = EXTENDED if self.extended_smtp and 'VRFY' not in syntax else ''
            self.held = [syntax + extended]

    def release(self):
        held, self.held = self.held, None
        for reply in held:
            self.push(reply)

    def smtp_VRFY(self, arg):
        self.carefully(super().smtp_VRFY, arg, '501 Syntax: VRFY <address>')
        self.release()

    def smtp_MAIL(self, arg):
        before = self.mailfrom, options_of(self, 'mail_options'), self.require_SMTPUTF8
        self.carefully(super().smtp_MAIL, arg, '501 Syntax: MAIL FROM: <address>')
        after = self.mailfrom, options_of(self, 'mail_options'), self.require_SMTPUTF8
        if before[0] or not after[0]:
            self.mail_options, self.require_SMTPUTF8 = before[1:]
            if before != after:
                self.fire('options-and-utf8-status')
        self.release()

    def smtp_RCPT(self, arg):
        before = len(self.rcpttos), options_of(self, 'rcpt_options')
        self.carefully(super().smtp_RCPT, arg, '501 Syntax: RCPT TO: <address>')
        if len(self.rcpttos) > self.smtp_server.rcpt_limit > 0:
            del self.rcpttos[before[0]:]
            self.held = [TOO_MANY]
            self.fire('recipient-cap')
        if len(self.rcpttos) == before[0]:
            if options_of(self, 'rcpt_options') != before[1]:
                self.fire('options-and-utf8-status')
            self.rcpt_options = before[1]
        self.release()

    def smtp_EHLO(self, arg):
        before = self.command_size_limits.get('MAIL', 512)
        super().smtp_EHLO(arg)
        more = self.command_size_limits.get('MAIL', 512) - before
        if more:
            shared = self.smtp_server.shared_limits
            shared['MAIL'] = shared.get('MAIL', 512) + more

    def smtp_HELP(self, arg):
        if arg and not arg.isascii():
            self.fire('command-bytes')
        super().smtp_HELP(arg and Ascii(arg))

    def smtp_DATA(self, arg):
        super().smtp_DATA(arg)
        if self.smtp_state == self.DATA:
            self.ac_in_buffer = b'\r\n' + self.ac_in_buffer
            self.swallow = 2

    def smtp_QUIT(self, arg):
        super().smtp_QUIT(arg)
        self.left = True


def options_of(channel, name):
    return list(getattr(channel, name, []))


def state_of(channel):
    """All that decides how a channel goes on."""
    if not channel.connected:
        return None
    pending = b''.join(piece.encode('utf-8') if isinstance(piece, str) else piece
                       for piece in channel.received_lines)
    if channel.smtp_state == channel.COMMAND:
        pending = pending[:513]    # what is kept of a line that is too long depends on the limits
    swallow = getattr(channel, 'swallow', 0)
    return (channel.smtp_state, channel.terminator, channel.seen_greeting, channel.extended_smtp,
            channel.mailfrom, tuple(channel.rcpttos), channel.require_SMTPUTF8,
            options_of(channel, 'mail_options'), options_of(channel, 'rcpt_options'),
            pending + channel.ac_in_buffer[swallow:])


def take_over(channel, other):
    """Put a new CPython channel into the state of another; False when it can't be in that state."""
    pieces = list(other.received_lines)
    if other._decode_data:
        if not all(is_utf8(piece) for piece in pieces):
            return False
        pieces = [piece.decode('utf-8') for piece in pieces]
    for name in ('smtp_state', 'terminator', 'seen_greeting', 'extended_smtp', 'mailfrom',
                 'require_SMTPUTF8', 'num_bytes', 'received_data'):
        setattr(channel, name, getattr(other, name))
    channel.rcpttos = list(other.rcpttos)
    channel.mail_options = options_of(other, 'mail_options')
    channel.rcpt_options = options_of(other, 'rcpt_options')
    channel.received_lines = pieces
    channel.ac_in_buffer = other.ac_in_buffer[other.swallow:]
    return True


class RecordingServer(smtpd.SMTPServer):
    shared_limits = collections.defaultdict(lambda: 512)   # CPython's, as Decided has it

    def process_message(self, peer, mailfrom, rcpttos, data, mail_options=(), rcpt_options=()):
        def raw(text):
            return text if isinstance(text, bytes) else text.encode('utf-8', 'surrogateescape')
        self.messages.append((raw(mailfrom), tuple(map(raw, rcpttos)), tuple(map(raw, mail_options)),
                              tuple(map(raw, rcpt_options)), raw(data)))
        outcome = self.outcomes[len(rcpttos) % len(self.outcomes)]
        if outcome == 'throw':
            raise HookError('told to throw')
        return outcome


Heard = collections.namedtuple('Heard', 'replies closed messages')   # of one event


class Side:
    """One of the two Python servers, with the clients of one session."""
    servers = {}

    def __init__(self, channel_class, session):
        self.map = {}
        server = self.servers.get(channel_class)
        if server is None:
            server = self.servers[channel_class] = RecordingServer(('127.0.0.1', 0), None, map={})
        self.server = server
        server.channel_class = channel_class
        server._map = self.map
        server.data_size_limit = session.size
        server.enable_SMTPUTF8 = session.smtputf8
        server._decode_data = session.decode_data
        server.rcpt_limit = session.rcpt_limit
        server.outcomes = session.outcomes
        server.messages = []
        self.clients, self.channels, self.told = {}, {}, set()

    def end(self):
        for sock in self.clients.values():
            sock.close()
        asyncore.close_all(self.map, ignore_all=True)

    def open(self, number):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.clients[number] = ours
        self.told.discard(number)
        before = set(self.map)
        self.server.handle_accepted(theirs, '')
        self.channels[number] = self.map[(set(self.map) - before).pop()]

    def event(self, op, number, data=b''):
        self.replies = collections.defaultdict(bytes)
        self.closed = set()
        self.server.messages = []
        channel = self.channels.get(number)
        if op == 'open':
            self.open(number)
        elif number in self.clients:
            if op == 'confuse':
                self.confuse(channel, number, data)
            elif op in ('write', 'leave'):
                self.send(number, data)
            elif op == 'shut':
                try:
                    self.clients[number].shutdown(socket.SHUT_WR)
                except OSError:
                    pass
            if op in ('close', 'leave'):
                self.clients.pop(number).close()
        self.settle(op in ('shut', 'close', 'leave'))
        return Heard(dict(self.replies), frozenset(self.closed), list(self.server.messages))

    def send(self, number, data):
        while data:
            try:
                data = data[self.clients[number].send(data):]
            except BlockingIOError:
                self.settle()
            except OSError:
                return

    def confuse(self, channel, number, data):
        if (channel.connected and channel.smtp_state == channel.COMMAND and not channel.num_bytes
                and not channel.ac_in_buffer):
            channel.smtp_state = 2
            self.send(number, data)
            self.settle()
            channel.smtp_state = channel.COMMAND

    def settle(self, ending=False):
        """Run the loop until nobody has anything to read, or to send."""
        passes = 3 if ending else 1
        while passes > 0:
            passes -= 1
            if self.map:
                asyncore.poll(0.0, self.map)
            for number in list(self.clients):
                self.receive(number)
            if passes <= 0 and any(c.producer_fifo or c.readable() and unread(c.socket)
                                   for c in self.map.values()):
                passes = 1

    def receive(self, number):
        while number not in self.told:
            try:
                data = self.clients[number].recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b''
            if data:
                self.replies[number] += data
            else:
                self.told.add(number)
                self.closed.add(number)


# ---------------------------------------------------------------------------------------------
# Sessions

Session = collections.namedtuple(
    'Session', 'size smtputf8 decode_data rcpt_limit outcomes poll events')


# What the first sessions of any seed begin with, so that a short run meets every text and row too:
# mode, size, outcomes, the lines of client 0, and of client 1 where there is one.
TOURS = [
    ('plain', 1000, [None],
     ['HELO', 'HELP', 'MAIL FROM:<a@b>', 'HELO a', 'HELP EHLO', 'help helo', 'HELP MAIL', 'HELP RCPT',
      'HELP DATA', 'HELP RSET', 'HELP NOOP', 'HELP QUIT', 'HELP VRFY', 'HELP FOO', 'MAIL', 'RCPT TO:<a@b>',
      'DATA', 'MAIL FROM:<a@b>', 'RCPT', 'RSET', 'EXPN a']),
    ('smtputf8', 1000, [None],
     ['EHLO', 'EHLO a', 'EHLO a', 'HELP MAIL', 'HELP RCPT', 'MAIL', 'MAIL FROM:<a@b> BODY=8',
      'MAIL FROM:<a@b> SMTPUTF8=1', 'MAIL FROM:<a@b> SIZE=1001', 'MAIL FROM:<a@b> FOO',
      'MAIL FROM:<a@b> SIZE', 'MAIL FROM:<a@[\\>]>', 'MAIL FROM:<a\x7f@b>', 'VRFY =?us-ascii?q?a=40b?=', 'MAIL FROM:<a@b> SMTPUTF8',
      'MAIL FROM:<a@b>', 'RCPT', 'RCPT TO:<a@b> FOO=1', 'DATA', 'RCPT TO:<=?us-ascii?q?a=40b?=@c>',
      'DATA now', 'RSET now', 'RSET', 'NOOP now', 'VRFY', 'VRFY ""', 'VRFY a', 'EXPN', 'x', 'é', '',
      'NOOP ' + 'x' * 512]),
    ('decode_data', 50, [None],
     ['EHLO a', 'MAIL FROM:<a@b>', 'RCPT TO:<a@b>', 'DATA', b'x' * 60 + b'\r\n.\r\n', 'NOOP',
      'MAIL FROM:<a@b>', 'RCPT TO:<a@b>', 'DATA', b'.\r\n', 'MAIL FROM:<a@b>', 'RCPT TO:<a@b>', 'DATA',
      b'\xff\r\n.\r\n']),
    ('plain', None, ['throw', '250 déjà vu'],
     ['HELO a', 'MAIL FROM:<a@b>', 'RCPT TO:<a@b>', 'DATA', b'a\r\n.\r\n', 'MAIL FROM:<a@b>',
      'RCPT TO:<a@b>', 'RCPT TO:<a@b>', 'DATA', b'a\r\n.\r\n', 'MAIL FROM:<a@b>', 'RCPT TO:<a@b>',
      'RCPT TO:<a@b>', 'RCPT TO:<a@b>', 'RSET', b'QUIT\r\nNOOP\r\n.\r\n']),
    ('plain', 1000, [None],
     ['MAIL FROM:<%s@b>' % ('a' * 508), 'RSET'],
     ['NOOP', 'RSET']),
]


def session_rng(seed, number):
    return random.Random('%s:%s' % (seed, number))


def make_session(seed, number):
    return Maker(session_rng(seed, number)).session(tour=number if number < 2 * len(TOURS) else None)


class Maker:
    """Makes a random session."""

    VERBS = ['HELO', 'EHLO', 'MAIL', 'RCPT', 'DATA', 'RSET', 'NOOP', 'QUIT', 'HELP', 'VRFY', 'EXPN']
    SPACES = ['\u00a0', '\u3000', '\u2003', '\u2028', '\u0085', '\u1680', '\u205f', '\x1c', '\x1f',
              '\x0b', '\x0c']
    CONTROLS = list('\x00\x01\x07\x08\x0b\x0c\x0d\x0a\x1b\x1c\x1e\x1f\x7f\x80\x85\t')
    SPECIALS = list('()<>@,:;.\\"[] \t=?') + ['=?', '?=', '\u00a0', '\u00a0 ', ' \u3000', '()', '""', 'é', 'a']
    LIMITS = [510, 511, 512, 513, 514, 536, 537, 538, 539, 540, 546, 547, 548, 549, 550, 562, 563,
              564, 565, 574, 600, 1000, 1024, 1025]
    STRAY_LINES = ['', ' ', ' NOOP', '\tNOOP', 'NOOP\t', 'NOOP\tx', '.', '..', 'QUITE', '\x00', '\x00NOOP',
                   'NO\x00OP', 'NOOP\x00', 'a\rb', 'NOOP\nQUIT', '\r', '\n', 'NOOP\r', '"', 'MAIL', 'RCPT']
    UNKNOWN = ['AUTH PLAIN', 'STARTTLS', 'server', 'state', 'SERVER', 'STATE', '__init__', 'LHLO x',
               'BDAT 1', 'ETRN', 'GET / HTTP/1.0', 'MAIL_', 'vrfy_']
    # upper() makes verbs of some of them
    WIDE_VERBS = ['é', 'qu\u0131t', 'ma\u0131l FROM:<a@b>', 'r\u017fet', 'nöop', 'NOOP\u00a0', '\u00a0NOOP',
                  'É FROM', '日本 x', 'e\ufb05', 'NOOP\u2028']
    # not UTF-8, or at the edge of it
    BROKEN = [b'\xff', b'NOOP \xff', b'\xc3', b'VRFY a@\xe9', b'\xed\xa0\x80', b'NOOP \xc0\x80',
              b'\xf5\x80', b'NOOP \xf5\x80\x80\x80', b'HELP \xf4\x90\x80\x80', b'NOOP \xf0\x80\x80\x80',
              b'HELP \xe0\x80\x80', b'HELP \xf4\x8f\xbf\xbf', b'HELP \xed\x9f\xbf', b'HELP \xc2\xa0',
              b'HELP \xdf\xbf\xbf', b'MAIL FROM:<\xe9@b>', b'RCPT TO:<a@\xc3>', b'HELP \x80',
              b'\x80\x80\x80\x80', b'EHLO \xe9']
    TO_BE_LONG = ['NOOP ', 'HELP', 'MAIL FROM:<a@b>', 'RCPT TO:<a@b>', 'x', 'VRFY a@b', 'QUIT', 'EXPN ',
                  'mail FROM:<a@b> SIZE=', 'ma\u0131l FROM:<a@b>', 'é', 'RSET', 'EHLO a@b']
    ENCODED_WORDS = ['=?utf-8?q?foo?=', '=?utf-8?q?a=40b?=', '=?UTF-8?B?Zm9v?=',
                     '=?utf-8?q?a=0D=0AX?=', '=?us-ascii?q?a_b?=', '=?utf-8?q?=22?=', '=?utf-8?q??=',
                     '=?utf-8?q?a?=0d', '=?x?y?z?=', '=?utf-8?q?a?', '=?utf-8*en?q?a?=', '=?',
                     '=?utf-8?q?=C3=A9?=', '=?nope?q?a?=', '=?utf-8?b?!!!?=', '=?utf-8?q?a b?=',
                     '=?utf-8?q?a?==?utf-8?q?b?=', '=?utf-8?q?a?= =?utf-8?q?b?=']
    LITERALS = ['127.0.0.1', 'IPv6:::1', ' 1.2.3.4 ', '1 2', '\\]', '[', '', 'a\\[b', 'é', '1.2.3.4\u00a0',
                '@', 'a]b']
    CFWS = [' ', '  ', '\t', '(c)', '(a(b)c)', ' (x) ', '(', '()', '(\\))', '( é )', '(a b)', '(\\',
            '(=?utf-8?q?x?=)', '(")', ' \u00a0', ' \u3000', ' \x0b']
    # lines of messages
    LINES = [b'Subject: test', b'From: someone@example.com', b'', b'', b'text', b'text', b'more of it',
             b'.', b'..', b'.x', b'...', b' .', b'bare\rCR', b'bare\nLF', b'\n', b'\r', b'x\r', b'\n.\n',
             b'\n.', b'.\n', b'.\r', b'\r.\r', 'é ü 日本 😀'.encode(), 'ab\u2028cd\u0085'.encode(),
             b'\x00\x01\x7f', b'QUIT', b'x' * 100]
    NOT_UTF8 = [b'\xff\xfe', b'\xe9t\xe9', b'\xc3', b'\xed\xa0\x80', b'\xf4\x90\x80\x80',
                b'\xf0\x8f\xbf\xbf', b'\xe0\x9f\xbf', b'\xf5\x80\x80\x80', b'\xc1\xbf']
    PARAMETERS = ['SIZE=0', 'SIZE=99999999999', 'SIZE', 'SIZE=', 'SIZE=abc', 'size=12', 'SIZE=-1',
                  'SIZE=+1', 'SIZE=1.5', 'SIZE=1=2', 'SIZE=\u00b2', 'SIZE=٣', 'SIZE=1_0',
                  'SIZE=' + '9' * 40, 'SIZE=00000000000000000000000000001', 'BODY=7BIT', 'BODY=8BITMIME',
                  'body=8bitmime', 'BODY=8BITM\u0131ME', 'BODY=BINARYMIME', 'BODY', 'BODY=', 'SMTPUTF8',
                  'SMTPUTF8', 'smtputf8', 'SMTPUTF8=x', 'SMTPUTF8=x', 'SMTPUTF8=yes', 'SMTPUTF8=', 'FOO',
                  'FOO=1', 'X-FOO=1', '=', '=1', 'A=B=C', 'é=1', 'FOO=é', 'RET=HDRS', 'AUTH=<>', '>', ',',
                  'NOTIFY=NEVER', '\u00a0SIZE=1', '(c)', 'BODY=7BIT\x0bSIZE=1', 'FOO=\x00', 'ß=1',
                  'S\x00IZE=1']

    def __init__(self, rng):
        self.r = rng

    def chance(self, p):
        return self.r.random() < p

    def pick(self, *choices):
        return self.r.choice(choices)

    def some(self, make, low, high):
        return [make() for _ in range(self.r.randint(low, high))]

    # -- addresses

    def cfws(self):
        if self.chance(0.7):
            return ''
        return self.r.choice(self.CFWS)

    def letters(self, low=1, high=8):
        return ''.join(self.some(lambda: self.r.choice('abcdefghijklmnopqrstuvwxyzABCXYZ0123456789'),
                                 low, high))

    def encoded_word(self):
        return self.r.choice(self.ENCODED_WORDS)

    def atom(self):
        if self.chance(0.08):
            return self.encoded_word()
        if self.chance(0.1):
            return self.pick('é', 'ü', '日本', 'ı', 'ß', '😀', '\u0301', '\u00b2', '٣')
        if self.chance(0.1):
            return ''.join(self.some(lambda: self.r.choice("!#$%&'*+-/=?^_`{|}~"), 1, 4))
        return self.letters()

    def quoted(self):
        def item():
            return self.pick(self.letters(), self.letters(), '\\"', '\\\\', ' ', '  ', '\t', '@', '<', '>',
                             '(', ')', '\\', ',', 'é', '\\é', '.', self.encoded_word(),
                             self.r.choice(self.SPACES[:7]), '\\ ')
        return '"' + ''.join(self.some(item, 0, 5)) + ('"' if self.chance(0.94) else '')

    def word(self):
        inner = self.quoted() if self.chance(0.3) else self.atom()
        return self.cfws() + inner + self.cfws()

    def local_part(self):
        text = self.word()
        while self.chance(0.4):
            text += self.pick('.', '.', '.', '.', ' ', '..', ' . ', '', '\\', '(c)') + self.word()
        return self.pick('', '', '', '', '', '.') + text + self.pick('', '', '', '', '', '', '.')

    def domain(self):
        if self.chance(0.15):
            inner = self.r.choice(self.LITERALS)
            if self.chance(0.5):
                inner = ''.join(self.some(lambda: self.r.choice(self.SPECIALS), 0, 5))
            return self.cfws() + '[' + inner + (']' if self.chance(0.9) else '') + self.cfws()
        text = self.cfws() + self.atom() + self.cfws()
        while self.chance(0.5):
            text += self.pick('.', '.', '.', '.', '.', '..', ' ', '@')
            text += self.cfws() + self.atom() + self.cfws()
        return text + self.pick('', '', '', '', '', '', '.')

    def addr_spec(self):
        return self.local_part() + ('@' + self.domain() if self.chance(0.9) else '')

    def route(self):
        hops = [self.pick('@', '@', '@', '', ' @') + self.domain() for _ in range(self.r.randint(1, 3))]
        text = self.pick(',', ',', ', ', ',,').join(hops)
        return self.pick('', '', '', ',', ' ') + text + self.pick(':', ':', '', ',:')

    def odd_address(self):
        kind = self.r.random()
        if kind < 0.12:
            return ''.join(self.some(lambda: self.r.choice(self.SPECIALS + ['a', 'b']), 0, 12))
        if kind < 0.35:
            text = self.addr_spec()
        else:
            text = self.cfws() + '<' + (self.route() if self.chance(0.2) else '') + self.addr_spec()
            text += self.pick('>', '>', '>', '>', '>', '>', '>', '', '>>', ' >') + self.cfws()
        if self.chance(0.1):
            text = self.pick('Joe ', 'group: ', '"Joe" ', '<', '(x)') + text
        while self.chance(0.25):
            text = self.mutated(text, self.SPECIALS)
        if self.chance(0.06):
            text = self.mutated(text, self.CONTROLS)
        return text

    def mutated(self, text, alphabet):
        at = self.r.randint(0, len(text))
        kind = self.r.randint(0, 3)
        if kind == 0:
            return text[:at] + self.r.choice(alphabet) + text[at:]
        if kind == 1:
            return text[:at] + text[at + 1:]
        if kind == 2:
            return text[:at] + self.r.choice(alphabet) + text[at + 1:]
        return text[:at] + text[max(0, at - 3):]

    def good_address(self):
        if self.chance(0.05):
            return '<é@example.com>'
        return self.pick('<a@b>', '<%s@%s.example>' % (self.letters(), self.letters()), 'user@example.com',
                         '<user.name+tag@[127.0.0.1]>', '<"quoted local"@example.org>', '<postmaster>',
                         '<@relay.example:user@example.com>')

    def address(self, odd):
        return self.odd_address() if odd else self.good_address()

    # -- parameters

    def parameter(self):
        limit = self.size or 1000
        if self.chance(0.15):
            return 'SIZE=%d' % self.pick(limit - 1, limit, limit + 1, self.r.randint(0, limit))
        return self.r.choice(self.PARAMETERS)

    def parameters(self, odd):
        if not odd:
            good = ['SIZE=%d' % self.r.randint(0, min(self.size or 1000, 1000))]
            if not self.decode_data:
                good += ['BODY=8BITMIME', 'BODY=7BIT']
            if self.smtputf8:
                good.append('SMTPUTF8')
            return ''.join(' ' + p for p in self.r.sample(good, self.r.randint(0, min(2, len(good)))))
        def separated():
            space = ' ' if self.chance(0.5) else self.pick('  ', '\t', '', '\u00a0', '\x0b', '\x1c', '\u3000')
            return space + self.parameter()
        made = self.some(separated, 0, 3)
        if made and self.chance(0.15):      # twice the same name
            made.append(' ' + self.pick(made[0].strip().split('=')[0], made[0].strip(), self.parameter()))
        return ''.join(made) + self.pick('', '', '', ' ', '\t', '\u2003')

    # -- commands: bytes, without the CR LF

    def case(self, word):
        if self.chance(0.8):
            return word
        return ''.join(self.pick(c.lower(), c.upper()) for c in word)

    def separator(self):
        if self.chance(0.9):
            return ' '
        return self.pick('  ', '\t', '', ' \t', ' \u00a0', '\u3000', ' \x0b', ' \x1c')

    def greeting(self):
        verb = 'EHLO' if self.chance(0.75) else 'HELO'
        name = 'client.example' if self.chance(0.9) else self.pick(
            '[127.0.0.1]', 'é', ' ', '', 'a b', '\x00', '\u00a0', '\x1c', 'x' * 505, '-')
        return self.case(verb) + self.separator() + name

    def mail(self, odd=False):
        keyword = 'FROM:' if not odd or self.chance(0.85) else self.pick(
            'from:', 'From:', 'FROM :', 'FROM', 'TO:', '', 'FROM:FROM:', 'FROM:\u00a0', ' FROM:')
        odd_parameters = odd and self.chance(0.5)
        extended = odd_parameters or self.extended and self.chance(0.5)
        text = self.case('MAIL') + self.separator() + keyword
        text += self.pick('', '', '', ' ', '\t' if odd else '')
        text += self.address(odd and self.chance(0.25 if odd_parameters else 0.9))
        return text + (self.parameters(odd_parameters) if extended else '')

    def rcpt(self, odd=False):
        keyword = 'TO:' if not odd or self.chance(0.85) else self.pick(
            'to:', 'To:', 'TO :', 'TO', 'FROM:', '', 'TO:TO:', 'TO:\x0c')
        text = self.case('RCPT') + self.separator() + keyword + self.pick('', '', '', ' ')
        odd_parameters = odd and self.chance(0.4)
        text += self.address(odd and self.chance(0.25 if odd_parameters else 0.9))
        return text + (self.parameters(True) if odd_parameters else '')

    def padded(self, text):
        """The command, as long as one of the limits or a byte off."""
        room = self.r.choice(self.LIMITS) - len(text.encode('utf-8'))
        if room <= 0:
            return text
        at = text.find('@')
        if at > 0 and self.chance(0.6):
            return text[:at] + 'a' * room + text[at:]
        if self.chance(0.2):
            return text + 'é' * (room // 2) + 'a' * (room % 2)
        return text + self.pick(' ', 'a', '0') * room

    def noise(self):
        kind = self.pick(0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 11, 12, 13, 13, 14, 14, 15)
        if kind == 0:
            return 'NOOP' + self.pick('', '', '', ' ', ' x', ' é', ' \u00a0')
        if kind == 1:
            return self.case('RSET') + self.pick('', '', '', ' ', ' x')
        if kind == 2:
            topic = self.pick(*self.VERBS, 'mail', 'rcpt', 'ma\u0131l', 'FOO', '', 'é', 'qu\u0131t', 'mail ')
            return 'HELP' + self.pick('', ' ' + topic, ' ' + topic, ' ' + topic)
        if kind in (3, 4):
            return self.case('VRFY') + self.pick('', ' ') + self.pick(
                '', '""', '(é)""', '"" é', self.good_address(), self.odd_address(), self.odd_address())
        if kind == 5:
            return 'EXPN' + self.pick('', ' list')
        if kind == 6:
            return self.greeting()
        if kind == 7:
            return self.r.choice(self.STRAY_LINES)
        if kind == 8:
            return self.r.choice(self.UNKNOWN)
        if kind == 9:
            return self.r.choice(self.WIDE_VERBS)
        if kind == 10:
            return self.r.choice(self.BROKEN)
        if kind == 11:
            return self.padded(self.r.choice(self.TO_BE_LONG))
        if kind == 12:
            return self.case('DATA') + self.pick('', ' ', ' x', ' é')
        if kind == 13:
            return self.mail(True)
        if kind == 14:
            return self.rcpt(True)
        salad = self.SPECIALS + self.CONTROLS + ['A', 'mail', 'é']
        return ''.join(self.some(lambda: self.r.choice(salad), 1, 20)).replace('\r\n', '')

    # -- messages: bytes, with the end

    def body(self):
        kind = self.r.random()
        if kind < 0.06:
            text = self.pick(b'', b'', b'.\r\n', b'.\r\nNOOP\r\n', b'\r\n', b'.\r\nfoo\r\n', b'..\r\n')
            return text + b'.\r\n'
        texts = self.LINES + (self.NOT_UTF8 if self.chance(0.1) else [])
        def line():
            return self.r.choice(texts) * (1 if self.chance(0.95) else self.r.randint(1, 40))
        lines = self.some(line, 0, 10)
        if lines and lines[0][:1] == b'.' and self.chance(0.7):
            lines[0] = b'.' + lines[0]
        lines = [b'..' if one == b'.' and self.chance(0.8) else one for one in lines]
        text = b''.join(one + b'\r\n' for one in lines) or b'\r\n'
        if self.size and self.size < 70000:
            if self.chance(0.3):     # the limit, or a byte off; the last CR LF belongs to the terminator
                length = max(0, self.size + self.r.randint(-2, 2))
                text = text[:-2] + b'y' * (length - len(text) + 2)
                text = text[:length].rstrip(b'\r') + b'\r\n'
            elif len(text) > self.size + 2 and self.chance(0.8):
                text = text[:self.size - 1].rstrip(b'\r') + b'\r\n'
        elif self.chance(0.02):
            text = b'z' * self.r.randint(60000, 70000) + b'\r\n' + text
        if self.chance(0.1):
            text += self.pick(b'\n.\n', b'\n.\r\n', b'\r.\r', b'.\r\r\n', b'\r\n.\n', b'\r\r\n', b'.\n')
            text += b'\r\n'
        return text + b'.\r\n'

    # -- the session

    def transaction(self):
        """Commands of one message; most of the time it is delivered."""
        odd = self.chance(0.3)
        if odd:
            yield self.mail(True)
            if self.chance(0.8):
                yield 'RSET'
        mail = self.mail()
        yield self.padded(mail) if self.chance(0.5 if self.paired else 0.08) else mail
        while self.chance(0.15):
            yield self.mail(self.chance(0.5))
        recipients = self.pick(1, 1, 1, 2, 3, 5)
        if self.chance(0.002):
            recipients = 1003
        if self.chance(0.08):      # addresses of all kinds; the message shows what was made of them
            for _ in range(self.r.randint(5, 25)):
                yield 'RCPT TO:' + self.odd_address()
        for _ in range(recipients):
            if self.chance(0.15):
                yield self.rcpt(True)
            while self.chance(0.08):
                yield self.noise()
            rcpt = self.rcpt()
            yield self.padded(rcpt) if self.chance(0.04) else rcpt
        if self.chance(0.95):
            yield self.case('DATA') + self.pick('', '', '', '', '', ' ', '\t' if self.chance(0.1) else '')
            yield self.body()

    def lines(self, first):
        """The bytes of one client, in the pieces that a well-behaved one would send."""
        made = []
        def add(*commands):
            for command in commands:
                if isinstance(command, str):
                    command = command.encode('utf-8')
                if command.endswith(b'.\r\n'):
                    made.append(command)
                    continue
                end = b'\r\n'
                if self.chance(0.015):
                    end = self.pick(b'\n', b'\r', b'\r\r\n', b'', b'\n\r\n', b'\r\n\r\n')
                made.append(command + end)
        for command in first:
            command = command.encode('utf-8') if isinstance(command, str) else command
            made.append(command if command.endswith(b'.\r\n') else command + b'\r\n')
        if self.chance(0.1):
            add(*self.some(self.noise, 1, 3))
        if first:
            self.extended = True
        elif self.chance(0.96):
            greeting = self.greeting()
            self.extended = greeting[:1] in 'eE'
            add(greeting)
            if greeting.endswith(' '):
                add('EHLO again')
        for _ in range(self.pick(1, 1, 1, 2, 2, 3)):
            while self.chance(0.25):
                add(self.noise())
            add(*self.transaction())
            if self.chance(0.02):
                made.append(b'QUIT\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\ntoo late\r\n.\r\n')
        if self.chance(0.1):
            add(*self.some(self.noise, 1, 12))
        if self.chance(0.01):
            much = self.pick('y', 'é') * self.r.randint(30000, 40000)
            add(self.pick('NOOP ', 'x', 'MAIL FROM:<a@b>', '') + much)
        if self.chance(0.4):
            add(self.case('QUIT') + self.pick('', '', '', ' ', ' x'))
            if self.chance(0.3):
                add(*self.pick(['NOOP'], list(self.transaction()), [self.noise()], ['RSET', 'QUIT']))
        if self.chance(0.04) and not first:
            at = self.r.randrange(len(made))
            made[at] = self.damaged(made[at])
        return made

    def damaged(self, data):
        for _ in range(self.r.randint(1, 3)):
            at = self.r.randint(0, len(data))
            new = self.pick(b'', b'\r', b'\n', b'\r\n', b'\0', b'\xff', bytes([self.r.randrange(256)]))
            data = data[:at] + new + data[at + self.r.randint(0, 1):]
        return data

    def chunks(self, lines):
        """The same bytes, cut as a network might."""
        kind = self.r.random()
        data = b''.join(lines)
        if kind < 0.35 and len(lines) < 300:
            return [line for line in lines if line]
        if kind < 0.5 or len(data) > 20000:
            return self.cut(data, 60000)
        if kind < 0.55 and len(data) < 1500:
            return [data[i:i + 1] for i in range(len(data))]
        if kind < 0.7:
            made = []
            while lines:
                count = self.r.randint(1, 4)
                made.append(b''.join(lines[:count]))
                lines = lines[count:]
            return [chunk for chunk in made if chunk]
        if kind < 0.85:           # between CR and LF, before a dot, inside a character
            places = re.finditer(rb'\r|\r\n(?=\.)|[\x80-\xff]|\r\n\.', data)
            cuts = [place.end() for place in places if self.chance(0.4)]
            made = [data[a:b] for a, b in zip([0] + cuts, cuts + [len(data)])]
            return [chunk for chunk in made if chunk]
        return self.cut(data, self.pick(*(n for n in (2, 5, 20, 100, 1000) if n * 500 > len(data)), 5000))

    def cut(self, data, longest):
        made = []
        while data:
            size = longest if longest > 20000 else self.r.randint(1, longest)
            made.append(data[:size])
            data = data[size:]
        return made

    def client(self, number, first=()):
        events = [('open', number, b'')]
        chunks = self.chunks(self.lines(first))
        events += [('write', number, chunk) for chunk in chunks]
        end = self.r.random()
        if end < 0.1:
            events.append(('shut', number, b''))
        elif end < 0.2:
            events.append(('close', number, b''))
        elif end < 0.26 and not first:
            op, _, data = events.pop()
            events.append(('leave' if op == 'write' else op, number, data))
        elif end < 0.32 and not first:
            keep = self.r.randint(1, len(events))
            events[keep:] = [(self.pick('shut', 'close'), number, b'')]
        if first or self.chance(0.04):
            at = 1 if first else self.r.randint(1, len(events))
            events.insert(at, ('confuse', number, self.pick(b'x\r\n', b'NOOP\r\n', b'MAIL FROM:<a@b>\r\n')))
        return events

    def session(self, size=..., mode=None, simple=False, tour=None):
        first = other = ()
        outcomes, rcpt_limit = [None], 1000
        if tour is not None:
            mode, size, outcomes, first, other = (*TOURS[tour % len(TOURS)], ())[:5]
            rcpt_limit = 2
        elif not simple:
            if self.chance(0.3):
                outcomes = self.some(lambda: self.pick(None, 'throw', *STATUSES), 1, 3)
            if self.chance(0.1):
                rcpt_limit = self.pick(0, 1, 2, 4)
        self.size = size if size is not ... else self.pick(
            None, None, 0, DEFAULT_LIMIT, DEFAULT_LIMIT, 300, 1000, 1000, 65536, self.r.randint(1, 200),
            self.r.randint(1, 3000))
        mode = mode or self.pick('plain', 'plain', 'smtputf8', 'smtputf8', 'decode_data')
        self.smtputf8, self.decode_data = mode == 'smtputf8', mode == 'decode_data'
        self.extended = False
        self.paired = bool(other) or tour is None and not simple and self.chance(0.12)
        events = self.client(0, first)
        if other:
            greeted = [('open', 0, b''), ('write', 0, b'EHLO a\r\n'), ('open', 1, b'')]
            events = greeted + self.merged(events[1:], self.client(1, other)[1:])
        elif self.paired:
            events = self.merged(events, self.client(1))
        return Session(self.size, self.smtputf8, self.decode_data, rcpt_limit, outcomes,
                       self.chance(0.5), events)

    def merged(self, one, other):
        made = []
        while one or other:
            source = one if not other or one and self.chance(0.5) else other
            made.append(source.pop(0))
        return made


# ---------------------------------------------------------------------------------------------
# The recorder

def for_driver(session, poll):
    lines = ['session %d %d %d %d %d %s' % (session.size or 0, session.smtputf8, session.decode_data,
                                            session.rcpt_limit, poll, FQDN)]
    for outcome in session.outcomes:
        if outcome in (None, 'throw'):
            lines.append('outcome ' + (outcome or 'none'))
        else:
            lines.append('outcome status ' + (outcome.encode('utf-8').hex() or '-'))
    for op, number, data in session.events:
        lines.append('%s %d %s' % (op, number, data.hex() or '-'))
    lines.append('end')
    return '\n'.join(lines) + '\n'


def message_of(line):
    fields = json.loads(line)
    def several(name):
        return tuple(bytes.fromhex(item) for item in fields[name + '_hex'])
    return (bytes.fromhex(fields['mailfrom_hex']), several('rcpttos'), several('mail_options'),
            several('rcpt_options'), bytes.fromhex(fields['data_hex']))


def from_driver(output):
    """One list of Heard for each session, and whether it left a channel behind."""
    sessions, heard = [], []
    replies, closed, messages = {}, set(), []
    for line in output.decode('utf-8').split('\n'):
        kind, _, rest = line.partition(' ')
        if kind == 'reply':
            number, text = rest.split()
            replies[int(number)] = replies.get(int(number), b'') + bytes.fromhex(text)
        elif kind == 'closed':
            closed.add(int(rest))
        elif kind == 'message':
            messages.append(message_of(rest))
        elif kind == 'done':
            heard.append(Heard(replies, frozenset(closed), messages))
            replies, closed, messages = {}, set(), []
        elif kind == 'end':
            sessions.append((heard, rest != '0'))
            heard = []
    return sessions


class Recorder:
    """Runs of the recorder; start() and result() leave time for something else in between."""
    def __init__(self, path):
        self.path = path

    def start(self, text):
        self.source = tempfile.TemporaryFile()
        self.source.write(text.encode())
        self.source.seek(0)
        self.target = tempfile.TemporaryFile()
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen([self.path, '--driver'], stdin=self.source, stdout=self.target,
                                        stderr=self.errors)

    def result(self, patience=STUCK):
        """What it has told, and None or how it failed."""
        try:
            status = self.process.wait(patience)
            failure = status and 'the recorder ended with status %s' % status
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            failure = 'the recorder is stuck'
        for file in (self.target, self.errors):
            file.seek(0)
        told, complaint = self.target.read(), self.errors.read().decode('utf-8', 'replace').strip()
        for file in (self.source, self.target, self.errors):
            file.close()
        return from_driver(told), failure and failure + '\n' + complaint[-2000:] or None

    def run(self, text, patience=STUCK):
        self.start(text)
        return self.result(patience)


def joined(session):
    """The session with neighbouring chunks in one piece."""
    events = []
    for op, number, data in session.events:
        if op == 'write' and events and events[-1][:2] == ('write', number):
            events[-1] = (op, number, events[-1][2] + data)
        else:
            events.append((op, number, data))
    return session._replace(events=events)


def bytewise(session):
    events = []
    for op, number, data in session.events:
        if op == 'write':
            events += [(op, number, data[i:i + 1]) for i in range(len(data))]
        else:
            events.append((op, number, data))
    return session._replace(events=events)


def variants(session):
    """(name, session, poll) for the port: as it is, and cut otherwise."""
    made = [('', session, session.poll), (' (joined)', joined(session), not session.poll)]
    length = sum(len(data) for op, _, data in session.events if op == 'write')
    if length < 3000 and length % 3 == 0:
        made.append((' (byte by byte)', bytewise(session), session.poll))
    return made


# ---------------------------------------------------------------------------------------------
# The comparison

BANNER = re.compile(rb'\A220 %s (?:C\+\+|Python) SMTP proxy version [^\s]+\r\n' % re.escape(FQDN.encode()))


def normalised(heard):
    replies = {number: BANNER.sub(b'220 {host} {version}\r\n', text)
               for number, text in heard.replies.items()}
    return heard._replace(replies=replies)


class Play:
    """A session on both Python sides."""

    def __init__(self, session):
        self.heard = []            # of decided, by event
        self.cpython = []          # of CPython, by event; None where it was away
        self.problems = []         # where CPython and the rows do not explain each other
        self.rows = collections.Counter()      # predicted
        self.shown = collections.Counter()     # and CPython was seen to differ there
        self.direct = 0            # events in which CPython itself was compared
        smtpd.SMTPChannel.command_size_limits.clear()
        decided, pristine = Side(Decided, session), Side(CPython, session)
        stale = set()
        try:
            for index, event in enumerate(session.events):
                stale = {n for n in stale if not self.refresh(decided, pristine, n)}
                number = event[1]
                if event[0] == 'open':
                    stale.discard(number)
                for channel in decided.channels.values():
                    channel.fired, channel.said = [], 0
                heard = normalised(decided.event(*event))
                self.heard.append(heard)
                if number in stale:
                    self.cpython.append(None)
                    self.count(decided.channels.get(number))
                    continue
                said = normalised(pristine.event(*event))
                self.cpython.append(said)
                if self.judge(index, decided, pristine, heard, said, number):
                    stale.add(number)
                else:
                    self.direct += 1
        finally:
            decided.end()
            pristine.end()

    def count(self, channel):
        for row in {row for row, _ in channel.fired}:
            self.rows[row] += 1

    def judge(self, index, decided, pristine, heard, said, number):
        """True when a row applied to this event, and CPython went another way."""
        ours, theirs = decided.channels.get(number), pristine.channels.get(number)
        if ours is None:
            return False
        same = heard == said and state_of(ours) == state_of(theirs)
        if not ours.fired:
            if ours.crash or not same:
                self.problems.append((index, 'CPython differs from decided, and no row says so' +
                                      (': ' + (ours.crash or theirs.crash or ''))))
            return not same
        if same:
            return False       # the row would have applied, but the outcome is the same
        row, agreed = ours.fired[0]
        mine, its = heard.replies.get(number, b''), said.replies.get(number, b'')
        if mine[:1] and not mine.startswith(b'220 {host}') and mine[:agreed] != its[:agreed]:
            self.problems.append((index, 'CPython differs from decided before the row ' + row))
        self.count(ours)
        self.shown[row] += 1
        return True

    def refresh(self, decided, pristine, number):
        """Give CPython's side a new channel in the state of decided; False when that can't be yet."""
        ours = decided.channels[number]
        old = pristine.clients.pop(number, None)
        if old:
            old.close()
            channel = pristine.channels.pop(number)
            if channel.connected:
                channel.close()
        if not ours.connected or number not in decided.clients:
            return False
        limits = smtpd.SMTPChannel.command_size_limits
        pristine.open(number)
        limits.clear()
        limits.update(RecordingServer.shared_limits)
        pristine.settle()
        pristine.receive(number)
        return take_over(pristine.channels[number], ours)


def total(heard):
    """What each client was told in all, who was closed, and all messages."""
    replies, closed, messages = collections.defaultdict(bytes), set(), []
    for one in heard:
        for number, text in one.replies.items():
            replies[number] += text
        closed |= one.closed
        messages += one.messages
    return {n: t for n, t in replies.items() if t}, closed, messages


def differences(play, told, names):
    """[(index of the event or None, what)] for one session."""
    found = list(play.problems)
    for name, (heard, left) in zip(names, told):
        heard = [normalised(one) for one in heard]
        if left:
            found.append((None, 'a channel outlived its client' + name))
        if name:
            a, b = total(heard), total(play.heard)
            if (a[0], a[1], sorted(a[2])) != (b[0], b[1], sorted(b[2])):
                found.append((None, 'the port answers otherwise when the chunks are cut otherwise' + name))
            continue
        if len(heard) != len(play.heard):
            found.append((None, 'the recorder answered %d of %d events' % (len(heard), len(play.heard))))
        for index, (mine, expected) in enumerate(zip(heard, play.heard)):
            for what in Heard._fields:
                if getattr(mine, what) != getattr(expected, what):
                    found.append((index, what + ' of the port differ'))
    return found


def evaluate(session, recorder):
    """One session on all sides: (play, what the recorder told, differences)."""
    play = Play(session)
    chosen = variants(session)
    told, failure = recorder.run(''.join(for_driver(s, poll) for _, s, poll in chosen), 20)
    found = differences(play, told, [name for name, _, _ in chosen])
    if failure:
        found.append((None, failure))
    return play, told, found


def shrunk(session, recorder, patience=20):
    """A smaller session that still differs."""
    end = time.monotonic() + patience

    def differs(events):
        if time.monotonic() > end:
            return False
        return bool(evaluate(session._replace(events=events), recorder)[2])

    def without(items, rebuild):
        size = len(items) // 2
        while size > 0:
            at = 0
            while at < len(items):
                fewer = items[:at] + items[at + size:]
                if differs(rebuild(fewer)):
                    items = fewer
                else:
                    at += size
            size //= 2
        return items

    events = without(list(session.events), lambda fewer: fewer)
    for index in range(len(events)):
        op, number, data = events[index]
        def rebuild(pieces):
            return events[:index] + [(op, number, b''.join(pieces))] + events[index + 1:]
        pieces = without(re.findall(rb'(?s).*?\r\n|.+\Z', data), rebuild)
        if len(b''.join(pieces)) < 2000:
            pieces = without([bytes([c]) for c in b''.join(pieces)], rebuild)
        events = rebuild(pieces)
    return session._replace(events=events)


def shown(data, most=700):
    text = repr(data)[2:-1]
    if len(text) <= most:
        return text
    return '%s ... (%d bytes) ... %s' % (text[:most // 2], len(data), text[-most // 4:])


def told_lines(side):
    """What one side said to one event, a line for each reply, closed connection and message."""
    if side is None:
        return ['-']
    lines = []
    for _, text in sorted(side.replies.items()):
        lines += [shown(reply) for reply in text.split(b'\r\n')[:-1]]
    lines += ['(closed)' for _ in side.closed]
    return lines + ['message %s' % shown(b'%r' % (message,)) for message in side.messages]


def transcript(session, play, told, found):
    lines = ['    size=%s smtputf8=%s decode_data=%s rcpt_limit=%s outcomes=%s poll=%s' % session[:-1]]
    marks = collections.defaultdict(list)
    for index, what in found:
        marks[index].append(what)
    heard = [normalised(one) for one in told[0][0]] if told else []
    for index, (op, number, data) in enumerate(session.events):
        lines.append('    %d %-8s %s' % (number, op, shown(data)))
        sides = {'C++': told_lines(heard[index] if index < len(heard) else None),
                 'decided': told_lines(play.heard[index]), 'CPython': told_lines(play.cpython[index])}
        same = os.path.commonprefix(list(sides.values()))
        for line in same[-6:]:
            lines.append('        %-8s%s' % ('all', line))
        for name, told_by in sides.items():
            rest = told_by[len(same):] or ['(nothing)']
            if any(len(one) > len(same) for one in sides.values()):
                lines += ['        %-8s%s' % (name, line) for line in rest[:6]]
        lines += ['    ^^^ ' + what for what in marks.get(index, [])]
    lines += ['    ^^^ ' + what for what in marks.get(None, [])]
    return '\n'.join(lines)


# ---------------------------------------------------------------------------------------------
# Reply texts

def check_texts():
    """The list above must hold every text in smtpd's source, and no other."""
    tree = ast.parse(inspect.getsource(smtpd.SMTPChannel))
    in_source = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
                 and isinstance(node.value, str) and re.match(r'\d{3}[ -]', node.value)}
    if in_source != set(TEXTS):
        sys.exit('TEXTS is not what smtpd.py says: %s' % sorted(in_source ^ set(TEXTS)))


def text_patterns():
    made = []
    special = {'220 %s %s': r'220 \{host\} \{version\}', '250 %s': '250 ' + re.escape(FQDN),
               '250-%s': '250-' + re.escape(FQDN), '250-SIZE %s': r'250-SIZE \d+'}
    for text in TEXTS + TEXTS_WITH_PARAMETERS + OUR_TEXTS:
        pattern = special.get(text) or re.escape(text).replace('%s', '.*')
        made.append((text, re.compile(pattern.encode('utf-8'), re.DOTALL)))
    for status in STATUSES:
        if status:
            for line in status.split('\r\n'):
                made.append(('what process_message() returned', re.compile(re.escape(line.encode('utf-8')))))
    return made


PATTERNS = text_patterns()
KNOWN = {}


def text_of(reply):
    text = KNOWN.get(reply)
    if text is None:
        text = next((text for text, pattern in PATTERNS if pattern.fullmatch(reply)), None)
        if text is not None and len(KNOWN) < 10000:
            KNOWN[reply] = text
    return text


# ---------------------------------------------------------------------------------------------
# Many sessions

class Summary:
    def __init__(self):
        self.sessions = self.complete = self.delivered = self.messages = self.untouched = 0
        self.events = self.direct = self.bytes = self.tcp = 0
        self.rows, self.shown, self.texts = (collections.Counter() for _ in range(3))
        self.differing = []        # (number of the session, transcript)

    def add(self, other):
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def note(self, session, play, heard, complete):
        self.sessions += 1
        self.complete += complete
        count = sum(len(one.messages) for one in heard)
        self.messages += count
        self.delivered += count > 0
        self.untouched += not play.rows
        self.events += len(session.events)
        self.direct += play.direct
        self.bytes += sum(len(data) for _, _, data in session.events)
        self.rows += play.rows
        self.shown += play.shown
        for one in heard:
            for text in normalised(one).replies.values():
                for reply in text.split(b'\r\n')[:-1]:
                    self.texts[text_of(reply) or 'NOT A KNOWN TEXT: ' + shown(reply, 100)] += 1


def explain(session, recorder, shrink):
    if shrink:
        session = shrunk(session, recorder)
    return transcript(session, *evaluate(session, recorder))


def compare_batch(job):
    seed, numbers, path = job
    recorder, summary = Recorder(path), Summary()
    sessions = [make_session(seed, number) for number in numbers]
    chosen = [variants(session) for session in sessions]
    recorder.start(''.join(for_driver(s, poll) for made in chosen for _, s, poll in made))
    plays = [Play(session) for session in sessions]
    told, failure = recorder.result()
    if failure or len(told) != sum(map(len, chosen)):
        told = None        # find out which session it was
    for number, session, play, made in zip(numbers, sessions, plays, chosen):
        if told is None:
            play, its, found = evaluate(session, recorder)
        else:
            its, told = told[:len(made)], told[len(made):]
            found = differences(play, its, [name for name, _, _ in made])
        heard = its[0][0] if its else []
        summary.note(session, play, heard, not found and len(heard) == len(play.heard))
        if found:
            summary.differing.append((number, explain(session, recorder, len(summary.differing) < 2)))
    return summary


def compare_tcp(path, seed, count, summary):
    """Sessions over TCP, to the recorder as a server: what a client hears in all, and what arrives."""
    for index, (size, mode) in enumerate(
            itertools.product((None, 500, DEFAULT_LIMIT), ('plain', 'smtputf8', 'decode_data'))):
        with tempfile.NamedTemporaryFile() as messages:
            options = ['--size', str(size or 0), '--fqdn', FQDN] + ['--poll'] * (index % 2)
            options += ['--' + mode.replace('_', '-')] * (mode != 'plain')
            server = subprocess.Popen([path, *options, '--stdin-eof', messages.name], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE)
            try:
                port = int(server.stdout.readline().split()[1])
                for number in range(index, count, 9):
                    session = Maker(session_rng(seed, 'tcp%d' % number)).session(size, mode, simple=True)
                    events = [e for e in session.events if e[0] in ('open', 'write')] + [('shut', 0, b'')]
                    play = Play(session._replace(events=events))
                    # What comes after QUIT makes the system answer with a reset, which may overtake replies.
                    last = next((i for i, heard in enumerate(play.heard) if heard.closed), len(events))
                    session = session._replace(events=events[:last + 1])
                    play = Play(session)
                    if play.rows['after-quit']:
                        continue
                    heard = over_tcp(port, session, messages)
                    summary.tcp += 1
                    expected = total(play.heard)
                    got = normalised(Heard({0: heard[0]}, frozenset(), heard[1]))
                    if (got.replies, got.messages) != (expected[0], expected[2]):
                        found = [(None, 'over TCP the port said %s' % shown(heard[0])),
                                 (None, 'and its messages were %r' % (heard[1],))]
                        summary.differing.append(('tcp%d' % number, transcript(session, play, [], found)))
            finally:
                server.stdin.close()
                if server.wait(20) != 0:
                    why = '    the recorder ended with status %d' % server.returncode
                    summary.differing.append(('tcp', why))
                server.stdout.close()


def over_tcp(port, session, messages):
    with socket.create_connection(('127.0.0.1', port), 20) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        heard = b''
        try:
            for op, _, data in session.events:
                sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass                   # it has closed already
        while data := sock.recv(65536):
            heard += data
    return heard, [message_of(line) for line in messages.read().split(b'\n') if line]


def report(summary, seed, seconds):
    def share(part, whole):
        return '%d (%.1f %%)' % (part, 100.0 * part / whole if whole else 0)

    print('Reply texts of the port, by how often they were seen:')
    for text, count in summary.texts.most_common():
        print('  %9d  %s' % (count, text))
    unseen = [text for text in TEXTS + TEXTS_WITH_PARAMETERS + OUR_TEXTS if not summary.texts[text]]
    unknown = [text for text in summary.texts if text.startswith('NOT A KNOWN')]
    print('Never seen: ' + ('none' if not unseen else ''))
    for text in unseen:
        print('             ' + text)
    print('Rows of the Deviations table (predicted; of these, where CPython itself was watched differing):')
    for row, what in ROWS.items():
        print('  %9d %9d  %-24s %s' % (summary.rows[row], summary.shown[row], row, what))
    print('Sessions to which no row applied: ' + share(summary.untouched, summary.sessions))
    print('Events compared with CPython itself: ' + share(summary.direct, summary.events))
    print('Sessions compared to the end: ' + share(summary.complete, summary.sessions))
    print('Sessions that delivered a message: ' + share(summary.delivered, summary.sessions))
    print('%d messages, %d bytes sent, %d events, %d sessions over TCP, %.1f s'
          % (summary.messages, summary.bytes, summary.events, summary.tcp, seconds))
    for number, text in sorted(summary.differing, key=lambda one: (len(one[1]), str(one[0])))[:20]:
        print('\nDifference in session %s (--seed %s --only %s shows it in full):' % (number, seed, number))
        print(text)
    if len(summary.differing) > 20:
        print('\n... and more: sessions %s' % ' '.join(str(n) for n, _ in summary.differing[:200]))
    print('%d sessions, %d differences' % (summary.sessions, len(summary.differing)))
    return (summary.differing or unseen or unknown or summary.delivered * 2 < summary.sessions
            or set(ROWS) - set(+summary.rows))


def main():
    here = pathlib.Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--sessions', type=int, default=2000)
    parser.add_argument('--seed', default='1')
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--tcp', type=int, default=None, metavar='N',
                        help='sessions over TCP (default: one in twenty)')
    parser.add_argument('--only', type=int, metavar='I', help='show this session of the seed')
    parser.add_argument('--shrink', action='store_true', help='with --only: find a smaller one that differs')
    parser.add_argument('--recorder', default=str(here.parent / 'recorder'))
    args = parser.parse_args()
    if not os.access(args.recorder, os.X_OK):
        sys.exit('%s is not there: build tests/recorder.cpp' % args.recorder)
    check_texts()
    if args.only is not None:
        recorder = Recorder(args.recorder)
        session = make_session(args.seed, args.only)
        if args.shrink:
            session = shrunk(session, recorder, 60)
        play, told, found = evaluate(session, recorder)
        print(transcript(session, play, told, found))
        print('rows: %s' % dict(play.rows))
        return bool(found)

    print('seed %s, %d sessions' % (args.seed, args.sessions), flush=True)
    start = time.monotonic()
    numbers = range(args.sessions)
    jobs = [(args.seed, numbers[at:at + BATCH], args.recorder) for at in range(0, args.sessions, BATCH)]
    summary = Summary()
    with multiprocessing.Pool(args.jobs, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        for part in pool.imap_unordered(compare_batch, jobs):
            summary.add(part)
    compare_tcp(args.recorder, args.seed, args.sessions // 20 if args.tcp is None else args.tcp, summary)
    return bool(report(summary, args.seed, time.monotonic() - start))


if __name__ == '__main__':
    sys.exit(main())

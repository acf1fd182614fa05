#!/usr/bin/env python3
"""What can be counted rather than timed: the same on a busy machine as on an idle one.

    tests/bench/counts.py [--update | --law [PATTERN]]

For case 2 of the bench (1 KiB messages over 20 kept connections): the instructions per message by
valgrind --tool=callgrind, and the system calls per message by strace -c, each from the difference of two runs,
so that start-up and connecting don't count. Then the heap that an idle connection takes, and the size of the
stripped smtpd with the processor time that a clean make takes.

And the law: no sequence of bytes, in a command or a message, costs more than law_times_plain times the instructions
that plain text of the same length costs, in any of the server classes; a byte of 1 MiB costs no more than
law_growth times a byte of 64 KiB; and no single event holds the loop longer than copying the message twice takes.
law.cpp feeds the bytes, callgrind counts the server's passes over them. What is compared with what:

    a message       with a letter as people write them, of the same length (lines of 0 to 68 columns), sent in packets
                    of the same size (64 KiB, and for some 512, 7 and 1 byte); from its first byte to its answer
    a command       with the line MAIL FROM:<ordinary address> of the same length, in the same packets
    a short one     (less than 24 bytes) with as many NOOPs, since no address fits there
    no line at all  with MAIL lines of 512 bytes
    an event        the longest pass of the loop, the shortest of three runs, with the time of two copies of the
                    message (4 MiB; of commands 64 KiB, what one recv() brings) and 2 ms, all in processor time

--law does this part alone, for the cases whose "CLASS: CASE" contains PATTERN, and names the functions that cost most.

ceiling.txt holds a ceiling for each; one that is exceeded makes the exit status 1. --update writes the ceilings
of the first two anew, 10 % above what was measured; the others are fixed.
"""
import argparse
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

sys.dont_write_bytecode = True      # nothing is to appear beside bench.py
import bench

CEILINGS = os.path.join(bench.HERE, 'ceiling.txt')
MEASURED = ('instructions_per_message', 'system_calls_per_message')
IDLE = 1000


class Server:
    """bench_server under a tool (or none), ended by SIGTERM so that the tool can write its results."""

    def __init__(self, tool=()):
        self.process = subprocess.Popen([*tool, bench.build_ours()], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True)
        line = self.process.stdout.readline()
        if not line.startswith('port '):
            sys.exit('counts: the server does not start: ' + self.process.stderr.read())
        self.port = int(line.split()[1])

    def load(self, messages):
        subprocess.run([bench.build_own_tool('load'), '-k', '-c', '20', '-n', str(messages), '127.0.0.1:%d' % self.port],
                       check=True, stdout=subprocess.DEVNULL)

    def stop(self):
        # The youngest of the family is the server itself; a tool that started it ends with it.
        os.kill(bench.family(self.process.pid)[-1], signal.SIGTERM)
        return self.process.communicate()[1]


def per_message(tool, read, first=500, second=2500):
    """The difference between two runs of different length, per message."""
    totals = []
    for messages in (first, second):
        server = Server(tool)
        server.load(messages)
        totals.append(read(server.stop()))
    return (totals[1] - totals[0]) / (second - first)


def instructions(scratch):
    tool = ['valgrind', '--tool=callgrind', '--callgrind-out-file=' + os.path.join(scratch, 'callgrind')]
    return per_message(tool, lambda text: int(re.search(r'Collected : (\d+)', text).group(1)))


def system_calls(scratch):
    summary = os.path.join(scratch, 'strace')

    def read(_):
        with open(summary) as f:
            return sum(int(line.split()[3]) for line in f if re.match(r' *[\d.]+ +[\d.]+ +\d+ +\d+ .*[^l]$', line)
                       and not line.rstrip().endswith('total'))
    return per_message(['strace', '-f', '-c', '-o', summary], read)


# ---- Heap ------------------------------------------------------------------------------------------------


class Client:
    def __init__(self, port):
        self.socket = socket.create_connection(('127.0.0.1', port))
        self.file = self.socket.makefile('rb')
        self.read('220')

    def read(self, code):
        line = self.file.readline().decode()
        if not line.startswith(code):
            sys.exit('counts: the server said ' + line)
        return line

    def say(self, text, code='250'):
        self.socket.sendall(text.encode() + b'\r\n')
        return self.read(code)

    def message(self, sender, text='x'):
        for command in ('MAIL FROM:<%s>' % sender, 'RCPT TO:<b@localhost>'):
            self.say(command)
        self.say('DATA', '354')
        return self.say(text + '\r\n.')


def heap_per_idle():
    """Bytes for a connection that was greeted, and for one that has brought a message and stayed."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    server = Server()
    probe = Client(server.port)
    probe.say('HELO localhost')

    def heap():
        return int(probe.message('heap').split()[2])
    heap()
    empty = heap()
    clients = [Client(server.port) for _ in range(IDLE)]
    greeted = heap()
    for client in clients:
        client.say('HELO localhost')
        client.message('a@localhost', 'x' * 1000)
    used = heap()
    server.stop()
    return (greeted - empty) / IDLE, (used - empty) / IDLE


# ---- Size ------------------------------------------------------------------------------------------------


def build_and_size(scratch):
    """The bytes of the stripped command, and the processor seconds of a clean make."""
    for name in os.listdir(bench.TOP):
        if name == 'Makefile' or name.endswith(('.cpp', '.hpp')):
            shutil.copy(os.path.join(bench.TOP, name), scratch)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(['make', '-C', scratch], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = os.path.join(scratch, 'smtpd')
    subprocess.run(['strip', program], check=True)
    return os.path.getsize(program), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# ---- The law ---------------------------------------------------------------------------------------------

TINY, SMALL, MIDDLE, LARGE, TIMED = 1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22
DEAR = 50                   # instructions a byte: beyond, 256 KiB stand in for 1 MiB
GRACE = 2e6                 # nanoseconds
PLAIN = '\r\n'.join("""\
Hello,

the box of spare parts has come. Three of them are for the old pump,
the others can wait until Monday.

> Did you count the screws?

Yes:
  24 short ones
  12 long ones

Regards,
--\x20
The store
""".split('\n')).encode()
PLAIN_CLASSES = ('SMTPServer', 'SMTPServer decode_data', 'DebuggingServer', 'DebuggingServer decode_data', 'PureProxy',
                 'MailmanProxy')
COMMAND_CLASSES = ('SMTPServer SMTPUTF8', 'PureProxy', 'MailmanProxy')
PASSED_ON = re.compile('RCPT|RSET|DATA|NOOP$|list')     # the commands that a proxy's channel sees to


def fill(unit, size):
    return (unit * (size // len(unit) + 1))[:size]


def lines(text, width=78):
    """The text in lines of that width, whole units."""
    return text * max((width - 2) // len(text), 1) + b'\r\n'


BODIES = {
    'CR': b'\r', 'LF': b'\n', 'CR CR LF': b'\r\r\n', 'CR LF': b'\r\n', 'LF CR': b'\n\r', 'LF . LF': b'\n.\n',
    'long lines': lines(b'The quick brown fox jumps over the lazy dog, and then over the dog again, 7.'),
    'CR, then lines': lines(b'\r'), 'lines that end in CR': PLAIN.replace(b'\r\n', b'\r'),
    'lines that end in LF': PLAIN.replace(b'\r\n', b'\n'), 'lines of one letter': b'a\r\n', 'CR, letter': b'a\r',
    'LF, letter': b'a\n', 'dots': b'.', 'dots on each line': b'.' + PLAIN, 'dot, CR LF': b'..\r\n',
    'lines of dots': lines(b'.'), 'dot, letter': b'.a', 'NUL': b'\0', 'lines of NUL': lines(b'\0'), 'ESC': b'\x1b',
    'control characters': bytes(c for c in range(32) if c not in (10, 13)), 'DEL': b'\x7f', 'TAB': b'\t',
    'high bytes': bytes(range(128, 256)), 'lines of 0xff': lines(b'\xff'), 'UTF-8 of 2': 'ä'.encode(),
    'lines of UTF-8 of 2': lines('ä'.encode()), 'UTF-8 of 3': '€'.encode(), 'UTF-8 of 4': '😀'.encode(),
    'UTF-8 cut off': b'\xe2\x82', 'UTF-8 cut off, of 4': b'\xf0\x9f\x98', 'C1 characters': b'\xc2\x9b',
    'no line end': b'x', 'CR LF . CR': b'\r\n.\r', 'CR LF . x': b'\r\n.x', 'CR LF . LF': b'\r\n.\n',
    'CR LF CR LF': b'x\r\n\r\n', 'CR LF . CR CR LF': b'\r\n.\r\r\n', 'CR . CR': b'\r.\r', 'CR LF ..': b'\r\n..',
    'header lines': b'A: b\r\n', 'header without colon': b'Subject\r\n', 'X-Peer lines': b'X-Peer: a\r\n',
    'From lines': b'From a\r\n', 'near From lines': b'FROX:\r\n', 'headers of five letters': b'abcd:e\r\n',
    'folded header': b' x\r\n', 'U+2028': '\u2028'.encode(), 'U+2028, letter': 'a\u2028'.encode(),
    'U+0085': '\u0085'.encode(), 'VT FF': b'\v\f', 'FS GS RS': b'\x1c\x1d\x1e',
    'half of U+2028': b'\xe2\x80\xaa', 'spaces': b' ', 'quotes': b'"\'\\\\',
}
IN_PACKETS = {1: 1024, 7: 8192, 512: SMALL}        # bytes of a packet: of the message
BODIES_IN_PACKETS = ('CR', 'LF', 'CR LF', 'dots', 'CR LF . CR', 'CR LF . x', 'NUL', 'UTF-8 of 3', 'CR CR LF', 'LF . LF')


def command(head, unit, tail='', length=500):
    """A line of at most that length, its line end included."""
    head, unit, tail = (t.encode('utf-8', 'surrogateescape') for t in (head, unit, tail))
    return head + unit * ((length - 2 - len(head) - len(tail)) // len(unit)) + tail + b'\r\n'


def commands():
    table = {'unknown verb': command('X', 'x'), 'unknown verb, words': command('XYZ ', 'abc '),
             'lower case verb': command('mail from:<', 'aaaaaaa.', 'b@c.test>'),
             'NOOP': b'NOOP\r\n', 'RSET': b'RSET\r\n', 'EHLO': b'EHLO a\r\n', 'HELP': b'HELP\r\n', 'VRFY': b'VRFY a\r\n',
             'HELP MAIL': b'HELP MAIL\r\n', 'DATA': b'DATA\r\n', 'DATA x': b'DATA x\r\n', 'EXPN': b'EXPN a\r\n',
             'HELP long': command('HELP ', 'x'), 'NOOP long': command('NOOP ', 'x'), 'EHLO long': command('EHLO ', 'x'),
             'empty line': b'\r\n', 'letter': b'x\r\n', 'CR CR LF': b'\r\r\n', 'space': b' \r\n', 'LF': b'\n\r\n',
             'MAIL': b'MAIL\r\n', 'MAIL FROM:': b'MAIL FROM:\r\n', 'MAIL FROM:<>': b'MAIL FROM:<>\r\n',
             'MAIL FROM:a': b'MAIL FROM:a\r\n', 'RCPT TO:<a>': b'RCPT TO:<a>\r\n', 'MAIL FROM:<': b'MAIL FROM:<\r\n',
             'MAIL FROM:.': b'MAIL FROM:.\r\n', 'MAIL FROM:<@': b'MAIL FROM:<@\r\n', 'VRFY (': b'VRFY (\r\n',
             'MAIL FROM:<.': b'MAIL FROM:<.\r\n', 'RCPT TO:<.': b'RCPT TO:<.\r\n', 'VRFY .': b'VRFY .\r\n',
             'RCPT TO:<a@': b'RCPT TO:<a@\r\n', 'VRFY a@[': b'VRFY a@[\r\n', 'RCPT TO:a b': b'RCPT TO:a b\r\n',
             'RCPT': command('RCPT TO:<', 'aaaaaaa.', 'b@c.test>'), 'RCPT of 64': command('RCPT TO:<', 'aaaaaaa.', 'b@c.test>', 64),
             'VRFY long': command('VRFY ', 'aaaaaaa.', 'b@c.test'), 'line too long': command('NOOP ', 'x', '', 700),
             'high bytes': command('', '\udcff'), 'high bytes behind': command('NOOP ', '\udcff'), 'NUL': command('NOOP ', '\0'),
             'UTF-8 verb': command('', 'ä'), 'UTF-8 cut off': command('NOOP ', '\udce2\udc82'),
             'unknown verb of UTF-8': command('X', '\u2003'),
             'parameters': command('MAIL FROM:<a@b> ', 'A=B '), 'parameters, no value': command('MAIL FROM:<a@b> ', 'A '),
             'parameters, all different': b'MAIL FROM:<a@b> ' + b' '.join(b'%X=1' % n for n in range(256, 336)) + b'\r\n',
             'many =': command('MAIL FROM:<a@b> A', '='), 'only =': command('MAIL FROM:<a@b> ', '= '),
             'long parameter': command('MAIL FROM:<a@b> ', 'A'), 'SIZE of many digits': command('MAIL FROM:<a@b> SIZE=', '9'),
             'spaces before parameters': command('MAIL FROM:<a@b>', ' ', 'A=B'), 'TABs': command('MAIL FROM:<a@b>', '\t')}
    for what, unit in (('space', ' '), ('TAB', '\t'), ('U+2003', '\u2003'), ('U+3000', '\u3000'), ('U+00A0', '\u00a0'), ('VT', '\v'),
                       ('euro', '€'), ('a umlaut', 'ä'), ('emoji', '😀')):
        table.update({'%s in front' % what: command('NOOP ', unit, 'x'), '%s behind' % what: command('NOOP x', unit),
                      'only %s' % what: command('NOOP ', unit), '%s after FROM:' % what: command('MAIL FROM:', unit, '<a@b>'),
                      '%s in an address' % what: command('MAIL FROM:<', unit, '@b>'),
                      '%s in a domain' % what: command('MAIL FROM:<a@', unit, '>'),
                      '%s in a domain literal' % what: command('MAIL FROM:<a@[', unit, ']>'),
                      '%s in a quoted string' % what: command('MAIL FROM:<"', unit, '"@b>'),
                      '%s behind an address' % what: command('MAIL FROM:<a@b>', unit)})
    for unit in ('. ', '().', ',', '\\', '(', '"\\"', '"', '"" ', '[', ']', '@', '<', '>', '.', ':', ';', ' a', 'a ', 'a. ', 'a .', '(a)',
                 '()', '( ', '(\\', ')', ' . .', 'a.a', '"a".', '"a" ', '. . "', '\\a', '\\ ', '\\.', '"\\a', 'a\\', '(). ', '. ()', '""',
                 ' (', '()"', '().()', '=?', '=?utf-8?q?a?=', 'a(', 'a()', '.()', 'a()b'):
        for where, head, tail in (('<%s', 'MAIL FROM:<', ''), ('<%s>', 'MAIL FROM:<', '>'), ('%s', 'MAIL FROM:', ''),
                                  ('<%s@b>', 'MAIL FROM:<', '@b>'), ('<a%s', 'MAIL FROM:<a', ''),
                                  ('<a@%s>', 'MAIL FROM:<a@', '>'), ('<a@[%s]>', 'MAIL FROM:<a@[', ']>'),
                                  ('<"%s"@b>', 'MAIL FROM:<"', '"@b>'), ('<@%s:a@b>', 'MAIL FROM:<@', ':a@b>'),
                                  ('to <%s', 'RCPT TO:<', ''), ('vrfy %s', 'VRFY ', '')):
            if where in ('to <%s', 'vrfy %s') and unit not in ('. ', '().', ',', '\\', '('):
                continue
            table[where % ('%s ..' % unit)] = command(head, unit, tail)
    for unit in ('@a,', '@a. b,', '@[],', '@a .b,', '@,', '@(a),', '@a. a. b,', '@().', '@a.(),', '@[a,', '@"",', ',', '(),', '@a,,'):
        table['<%s ..:x@y>' % unit] = command('MAIL FROM:<', unit, '@a:x@y>')
        table['<%s ..' % unit] = command('MAIL FROM:<', unit)
    return table


NO_LINE = {'no line end': b'x', 'CR': b'\r', 'LF': b'\n', 'NUL': b'\0', 'spaces': b' ', 'CR x': b'\rx', 'high bytes': b'\xff',
           'U+2003': '\u2003'.encode()}
# Whole transactions: what they cost is theirs; it may not grow. Not by the proxies: most of it would be the next server's.
TRANSACTIONS = {
    'empty messages': b'MAIL FROM:a\r\nRCPT TO:a\r\nDATA\r\n.\r\n',
    'RSET between': b'MAIL FROM:a\r\nRSET\r\n',
    'MAIL, RCPT, RSET': b'MAIL FROM:a\r\nRCPT TO:a\r\nRSET\r\n',
}


def reference_line(length):
    """A plain command of just that length."""
    head, tail = b'MAIL FROM:<', b'b@c.test>\r\n'
    if length < 24:
        return b'NOOP\r\n'
    return head + fill(b'aaaaaaa.', length - len(head) - len(tail) - 1) + b'a' + tail


class Case:
    """What is sent, and what it is compared with."""

    def __init__(self, kind, name, make, reference=None, packet=65536, sizes=(SMALL, LARGE)):
        self.kind, self.name, self.make, self.reference, self.packet, self.sizes = kind, name, make, reference, packet, sizes
        self.cost, self.dump = {}, {}       # by size: instructions; callgrind's file
        self.event = None                   # nanoseconds: of the longest pass, of two copies

    def ratio(self, size):
        return self.cost[size] / self.reference.cost[size] if self.reference and size in self.cost else None

    def growth(self):
        large = max(self.cost, default=0)
        return self.cost[large] / self.cost[SMALL] / (large / SMALL) if large > SMALL else None


def case_table(name, pattern):
    """The cases of a class, what they are compared with first."""
    cases, references = [], {}

    def reference(kind, key, make, packet, sizes):
        if (kind, key, packet) not in references:
            references[kind, key, packet] = Case(kind, 'plain, %s' % key, make, None, packet, sizes)
        return references[kind, key, packet]

    def body(unit):
        return lambda size: fill(unit, size) + b'\r\n.\r\n'

    def by_line(line, length):
        return lambda size: line * max(size // length, 1)

    if name in PLAIN_CLASSES:
        for packet, size in [(65536, None), *IN_PACKETS.items()]:
            sizes = (size,) if size else (SMALL, LARGE)
            for what, unit in BODIES.items():
                full = 'message: %s%s' % (what, ' by %d' % packet if size else '')
                if (not size or what in BODIES_IN_PACKETS) and pattern in name + ': ' + full:
                    cases.append(Case('body', full, body(unit), reference('body', 'text', body(PLAIN), packet, sizes),
                                      packet, sizes))
    if name in COMMAND_CLASSES:
        for what, line in commands().items():
            if pattern in name + ': command: ' + what and (name == COMMAND_CLASSES[0] or PASSED_ON.match(what)):
                key, sizes = len(line), (SMALL, LARGE) if PASSED_ON.match(what) else (TINY,)
                cases.append(Case('commands', 'command: ' + what, by_line(line, key), reference(
                    'commands', key, by_line(reference_line(key), key), 65536, (TINY, SMALL, LARGE)), 65536, sizes))
        for what, unit in NO_LINE.items():
            if pattern in name + ': no line: ' + what:
                cases.append(Case('commands', 'no line: ' + what, (lambda u: lambda size: fill(u, size))(unit),
                                  reference('commands', 512, by_line(reference_line(512), 512), 65536, (SMALL, LARGE))))
        for what, text in TRANSACTIONS.items():
            if name == COMMAND_CLASSES[0] and pattern in name + ': transaction: ' + what:
                cases.append(Case('commands', 'transaction: ' + what, by_line(b'RSET\r\n' + text, len(text) + 6)))
    return list(references.values()), cases


class Law:
    """One class of server under the law."""

    def __init__(self, name, scratch, pattern, ceilings):
        self.name, self.scratch, self.ceilings = name, os.path.join(scratch, name.replace(' ', '-')), ceilings
        self.references, self.cases = case_table(name, pattern)
        os.makedirs(os.path.join(self.scratch, 'lists'))

    def command(self, *options):
        return [build_law(), *options, *self.name.split(), os.path.join(self.scratch, 'lists')]

    def run(self, command, cases, size_of):
        table = ''
        for i, case in enumerate(cases):
            path = os.path.join(self.scratch, str(i))
            with open(path, 'wb') as f:
                f.write(case.make(size_of))
            table += '%s %d %s\n' % (case.kind, case.packet, path)
        done = subprocess.run(command, input=table, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit('counts: %s: %s' % (self.name, done.stderr))
        return done.stderr

    def sizes_of(self, case):
        """At which a case is counted; what is above at 64 KiB already, isn't at 1 MiB."""
        if LARGE in case.sizes and SMALL in case.cost:
            dear = case.cost[SMALL] > DEAR * SMALL
            if case in self.references:
                return (MIDDLE,) if dear else (MIDDLE, LARGE)
            if case.ratio(SMALL) and case.ratio(SMALL) > self.ceilings['law_times_plain']:
                return ()
            return (MIDDLE,) if dear or (case.reference and case.reference.cost[SMALL] > DEAR * SMALL) else (LARGE,)
        return case.sizes

    def count(self):
        for size in sorted({*IN_PACKETS.values(), TINY, SMALL, MIDDLE, LARGE}):
            cases = [case for case in self.references + self.cases
                     if size not in case.cost and size in self.sizes_of(case) and not (size == LARGE and SMALL not in case.cost)]
            if not cases:
                continue
            out = os.path.join(self.scratch, 'callgrind.%d' % size)
            self.run(['valgrind', '-q', '--tool=callgrind', '--toggle-collect=law_pass', '--dump-after=law_case',
                      '--callgrind-out-file=' + out, *self.command()], cases, size)
            for i, case in enumerate(cases):
                case.dump[size] = '%s.%d' % (out, i + 1)
                with open(case.dump[size]) as f:
                    case.cost[size] = int(re.search(r'^summary: (\d+)', f.read(), re.M).group(1))

    def time(self):
        """The longest event of each case that isn't hopeless, alone on the machine."""
        for kind, size in (('body', TIMED), ('commands', SMALL)):
            cases = [case for case in self.cases if case.kind == kind and case.packet == 65536 and
                     (case.growth() is not None or kind == 'commands')]
            text = self.run(self.command('--time'), cases, size) if cases else ''
            for case, line in zip(cases, text.splitlines()):
                case.event = tuple(int(word) for word in line.split())

    def verdict(self, case):
        """What a case breaks: (figure, ceiling) by name."""
        broken = {}
        for size in case.cost:
            if (case.ratio(size) or 0) > max(self.ceilings['law_times_plain'], broken.get('law_times_plain', 0)):
                broken['law_times_plain'] = case.ratio(size)
        if (case.growth() or 0) > self.ceilings['law_growth']:
            broken['law_growth'] = case.growth()
        if case.event and case.event[0] > case.event[1] + GRACE:
            broken['law_times_copying'] = case.event[0] / (case.event[1] + GRACE)
        return broken


def build_law():
    return bench.build('law', os.path.join(bench.HERE, 'law.cpp'), os.path.join(bench.TOP, 'smtpd.cpp'),
                       os.path.join(bench.TOP, 'asyncore.cpp'))


def dearest(dump, count=3):
    """The functions that cost most by themselves, of one of callgrind's files."""
    names, costs, function, called = {}, {}, None, False
    with open(dump) as f:
        for line in f:
            if line.startswith('calls='):
                called = True           # the next line is what was called, not this function's own
            elif match := re.match(r'(c?fn)=(\(\d+\))(?: (.*))?$', line):
                if match[3]:
                    names[match[2]] = match[3]
                if match[1] == 'fn':
                    function = match[2]
            elif line[0] in '+-*0123456789':
                if not called:
                    costs[function] = costs.get(function, 0) + int(line.split()[1])
                called = False
    total = sum(costs.values())
    short = (lambda name: re.sub(r"\(.*|'\d+$|std::__cxx11::|std::|asyncore::|asynchat::|smtpd::|\(anonymous namespace\)::|__|_avx2.*",
                                 '', name.replace('(anonymous namespace)::', '')))
    return ['%s %.0f %%' % (short(names[f]), 100 * cost / total)
            for f, cost in sorted(costs.items(), key=lambda item: -item[1])[:count]]


def law(ceilings, pattern='', tell=False):
    """The worst of each figure of the law; prints what is above, or, when asked, everything."""
    build_law()
    worst = dict.fromkeys(('law_times_plain', 'law_growth', 'law_times_copying'), 0)
    with tempfile.TemporaryDirectory() as scratch:
        laws = [Law(name, scratch, pattern, ceilings) for name in dict.fromkeys(PLAIN_CLASSES + COMMAND_CLASSES)]
        laws = [it for it in laws if it.cases]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(Law.count, laws))
        print('%-28s %-44s %9s %9s %7s %9s %9s' % ('class', 'case', 'x plain', '1 MiB', 'growth', 'ms', 'ms'))
        for it in laws:
            it.time()
            for case in sorted(it.cases, key=lambda c: -(max(filter(None, map(c.ratio, c.cost)), default=0))):
                broken = it.verdict(case)
                sizes = sorted(case.cost)
                ratios = [case.ratio(size) for size in sizes]
                for name, figure in (('law_times_plain', max(filter(None, ratios), default=0)),
                                     ('law_growth', case.growth() or 0),
                                     ('law_times_copying', case.event[0] / (case.event[1] + GRACE) if case.event else 0)):
                    worst[name] = max(worst[name], figure)
                if not broken and not tell:
                    continue
                cells = [('%9.2f' % r) if r else '        -' for r in (ratios + [None])[:2]]
                cells.append('%7.2f' % case.growth() if case.growth() else '      -')
                cells += ['%9.2f' % (ns / 1e6) for ns in case.event] if case.event else ['        -'] * 2
                print('%-28s %-44s %s%s' % (it.name, case.name, ' '.join(cells), '   ABOVE' if broken else ''))
                if broken and tell:
                    print('    ' + ', '.join(dearest(case.dump[sizes[0]])))
    return worst


# ---- The ceilings ----------------------------------------------------------------------------------------


def read_ceilings():
    with open(CEILINGS) as f:
        return dict((line.split()[0], float(line.split()[1])) for line in f if line.strip() and line[0] != '#')


def write_ceilings(figures):
    with open(CEILINGS) as f:
        lines = f.readlines()
    with open(CEILINGS, 'w') as f:
        for line in lines:
            name = line.split()[0] if line.strip() else ''
            f.write('%s %g\n' % (name, float('%.4g' % (figures[name] * 1.1))) if name in MEASURED else line)


def measure():
    with tempfile.TemporaryDirectory() as scratch:
        figures = {'instructions_per_message': instructions(scratch), 'system_calls_per_message': system_calls(scratch)}
    figures['heap_of_idle_connection'], figures['heap_of_used_connection'] = heap_per_idle()
    if os.path.exists(os.path.join(bench.TOP, 'Makefile')):
        with tempfile.TemporaryDirectory() as scratch:
            figures['stripped_bytes'], figures['make_seconds'] = build_and_size(scratch)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--update', action='store_true', help='write the ceilings of instructions and system calls anew')
    parser.add_argument('--law', nargs='?', const='', metavar='PATTERN', help='only the law: the cases for whose "CLASS: CASE" contains PATTERN')
    args = parser.parse_args()
    for tool in ('valgrind', 'strace'):
        if shutil.which(tool) is None:
            sys.exit('counts: %s is not installed' % tool)
    ceilings = read_ceilings()
    figures = measure() if args.law is None else {}
    figures.update(law(ceilings, args.law or '', args.law is not None))
    if args.update:
        write_ceilings(figures)
    ceilings = read_ceilings()
    above = False
    for name, figure in figures.items():
        over = figure > ceilings[name]
        above = above or over
        print('%-26s %10.6g   ceiling %10.6g%s' % (name, figure, ceilings[name], '   ABOVE' if over else ''))
    return 1 if above else 0


if __name__ == '__main__':
    sys.exit(main())

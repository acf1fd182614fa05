#!/usr/bin/env python3
"""The server under load, and under everything that clients do wrong, for as long as you like.

    soak.py load [COUNT ...]    1,000 connections at once with select(), 10,000 with poll(): a message on each
    soak.py soak [-t SECONDS]   clients of all kinds at the same time, well behaved and not (soak_client.cpp);
                                --poll, --proxy: poll() instead of select(), PureProxy in front of a second server;
                                --all: these three one after another, SECONDS altogether
    soak.py selftest [FAULT ...]   servers that do something wrong on purpose (soak_server.cpp): is it noticed?

What must hold, or the exit status is 1:

    - each message that was acknowledged was delivered, once and unchanged; nothing else was delivered, except,
      once, what a client sent to its end and did not wait to hear about
    - who sticks to the rules gets the right replies; a probe is through in 2 s, in 10 s when descriptors run out
    - idle clients are closed; in the end no descriptor is left, and the heap is what it was in the beginning
    - the last third of the time takes no more memory than the middle one (10 % and 4 MiB to spare)
    - an idle connection takes 2 KiB of heap at most
    - no exception is logged; SIGTERM ends the server with 0

It compiles its two programs with $CXX (c++), unless --server and --client name them; the server may be one with
sanitizers. The exit status is 77 where something is lacking; with NO_SKIP=1 in the environment it is 1.
"""
import argparse
import collections
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

TOP = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..')
IDLE, FILES, HOGS, RATE = 3, 600, 600, 150      # of the soak: seconds, descriptors, and see soak_client.cpp
LIMITS = ['--rcpts', '250', '--size', str(1 << 20)]
MIB = float(1 << 20)
FAULTS = {      # and what is to be noticed
    'fd': ['descriptors are left over'], 'memory': ['the heap has grown', 'memory grows'],
    'drop': ['acknowledged and not delivered'], 'twice': ['delivered twice'],
    'damage': ['acknowledged and not delivered', 'that nobody sent'], 'stall': ['probe: it took'],
    'idle': ['client: idle: not done'], 'exit': ['ended with 3']}


class Lacking(Exception):
    """What is needed is not here."""


class Check(list):
    """What was found to be wrong in one run."""

    def __call__(self, fine, complaint):
        if not fine:
            self.append(complaint)
            print('FAILED  ' + complaint, flush=True)


class Program:
    """A program under way; it gets its arguments and a file for keys. It is killed at the end, should it still run."""

    def __init__(self, check, keys, *command, **more):
        self.check, self.keys = check, keys
        self.process = subprocess.Popen([str(word) for word in command], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, **more)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def go(self):
        self.process.stdin.write('\n')
        self.process.stdin.flush()

    def read_keys(self):
        with open(self.keys) as f:
            return f.read().split()


class Server(Program):
    """A running soak_server. It ends with this program, whatever happens, for its standard input does."""

    def __init__(self, check, program, keys, *options):
        self.log = keys + '.log'
        env = dict(os.environ)
        env.setdefault('ASAN_OPTIONS', 'quarantine_size_mb=4')              # what is freed shall not look
        env.setdefault('GLIBC_TUNABLES', 'glibc.malloc.tcache_count=0')     # as if it was in use
        with open(self.log, 'w') as log:
            super().__init__(check, keys, program, '--keys', keys, *LIMITS, *options, stderr=log, env=env)
        self.port = self.answer()['port']
        self.before = self.status()

    def answer(self):
        words = self.process.stdout.readline().split()
        if not words:
            raise RuntimeError('the server has ended with %s\n%s' % (self.process.wait(), ''.join(self.logged()[-20:])))
        return dict(zip(words[::2], map(int, words[1::2])))

    def status(self):
        """Bytes of heap, dispatchers in the map, descriptors, bytes of memory now and at most."""
        self.go()
        return dict(self.answer(), files=self.descriptors(), rss=self.memory('VmRSS'), peak=self.memory('VmHWM'))

    def descriptors(self):
        return len(os.listdir('/proc/%d/fd' % self.process.pid))

    def memory(self, what='VmRSS'):
        with open('/proc/%d/status' % self.process.pid) as f:
            return int(re.search(what + r':\s*(\d+) kB', f.read()).group(1)) * 1024

    def logged(self, word=''):
        with open(self.log, errors='replace') as f:
            return [line for line in f if word in line]

    def stop(self):
        """Ends it, after the clients have gone; returns its last status."""
        end = time.monotonic() + 2 * IDLE + 5
        while self.descriptors() > self.before['files'] and time.monotonic() < end:
            time.sleep(0.05)
        status = self.status()
        self.check(status['files'] == self.before['files'],
                   '%d descriptors are left over' % (status['files'] - self.before['files']))
        self.check(status['map'] == self.before['map'], 'the map holds %(map)d dispatchers in the end' % status)
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(20)
        except subprocess.TimeoutExpired:
            code = 'nothing: it runs on'
        self.check(code == 0, 'the server ended with %s\n%s' % (code, ''.join(self.logged()[-20:])))
        logged = self.logged('uncaptured')
        self.check(not logged, '%d exceptions were logged, the first is: %s' % (len(logged), ''.join(logged[:1])))
        return status


class Client(Program):
    def line(self):
        """The next line that is no complaint; '' at the end."""
        for line in self.process.stdout:
            if not line.startswith('FAILED'):
                return line.strip()
            self.check(False, 'client: ' + line[6:].strip())
        self.check(self.process.wait() in (0, 1), 'the client has crashed')
        return ''


def compare(check, client, server):
    """Nothing lost, nothing twice, nothing that nobody sent."""
    words, delivered = client.read_keys(), collections.Counter(server.read_keys())
    acknowledged, unheard = ({k for m, k in zip(words[::2], words[1::2]) if m == mark} for mark in 'au')
    twice = sum(n > 1 for n in delivered.values())
    lost, strange = acknowledged - set(delivered), set(delivered) - acknowledged - unheard
    check(acknowledged, 'no message was acknowledged')
    check(not lost, '%d messages were acknowledged and not delivered' % len(lost))
    check(not twice, '%d messages were delivered twice' % twice)
    check(not strange, '%d messages were delivered that nobody sent like that' % len(strange))
    print('    %d messages acknowledged, %d delivered; of %d that nobody waited for, %d' % (
        len(acknowledged), sum(delivered.values()), len(unheard), len(unheard & set(delivered))), flush=True)
    return len(acknowledged)


def load(args, folder, count):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= hard < count + 50:
        raise Lacking('%d connections take as many descriptors, and the limit is %d' % (count, hard))
    poll = count > 1000     # select() can't have more
    print('load: %d connections at once, %s' % (count, 'poll()' if poll else 'select()'), flush=True)
    check, keys = Check(), folder + '/client'
    with Server(check, args.server, folder + '/server', *['--poll'] * poll) as server:
        start = time.monotonic()
        with Client(check, keys, args.client, 'load', count, server.port, keys) as client:
            check(client.line() == 'greeted %d' % count, 'not all were greeted')
            connecting, idle = time.monotonic() - start, server.status()
            check(idle['files'] - server.before['files'] == count, '%(files)d descriptors are open' % idle)
            start = time.monotonic()
            client.go()
            check(client.line() == 'answered %d' % count, 'not all were answered')
            sending, used = time.monotonic() - start, server.status()
            client.go()
            check(client.line() == '', 'the client talks on')
        server.stop()
        heap, idle, used = (each // count for each in (idle['heap'] - server.before['heap'],
                                                       idle['rss'] - server.before['rss'],
                                                       used['rss'] - server.before['rss']))
        check(heap <= 2048, 'an idle connection takes %d bytes of heap' % heap)
        print('    connected in %.2f s, messages in %.2f s; a connection takes %d bytes of heap, %d of RSS, after a '
              'message %d of RSS' % (connecting, sending, heap, idle, used))
        check(compare(check, client, server) == count, 'not every client has delivered its message')
    return check


def watch(server, client, every):
    """Prints a line now and then, until the client is done; returns (seconds, RSS, descriptors) of each second."""
    samples, begin = [], time.monotonic()
    row = '    ' + '%8s%10s%13s%9s%9s%10s%13s%20s'
    print(row % ('seconds', 'RSS MiB', 'descriptors', 'clients', 'so far', 'messages', 'turned away',
                 'slowest probe, ms'))
    for line in iter(client.line, ''):
        if server.process.poll() is not None:
            server.answer()     # which says why
        samples.append((time.monotonic() - begin, server.memory(), server.descriptors()))
        words = line.split()
        if len(samples) % every == 1:
            print(row % ('%.0f' % samples[-1][0], '%.1f' % (samples[-1][1] / MIB), samples[-1][2], *words[1:9:2],
                         '%s, starved %s' % (words[9], words[11])), flush=True)
    return samples


def soak(args, folder, seconds, mode, fault='', idle=IDLE, hogs=HOGS):
    print('soak: %s, %d s, seed %d %s' % (mode, seconds, args.seed, fault), flush=True)
    check = Check()
    options = ['--idle', idle, '--files', FILES, '--fault', fault] + ['--poll'] * (mode == 'poll')
    with Server(check, args.server, folder + '/upstream') as upstream:
        if mode == 'proxy':
            options += ['--proxy', '127.0.0.1:%d' % upstream.port]
        with Server(check, args.server, folder + '/server', *options) as server:
            keys = folder + '/client'
            with Client(check, keys, args.client, 'soak', seconds, args.seed, RATE, hogs, idle, server.port,
                        keys) as client:
                samples = watch(server, client, 2 if seconds < 30 else 10)
            end = server.stop()
            upstream.stop()
            middle, last = (statistics.median(rss for age, rss, _ in samples if i <= age * 3 / seconds < i + 1) / MIB
                            for i in (1, 2))
            heap = (end['heap'] - server.before['heap']) >> 10
            check(last <= middle * 1.1 + 4, 'memory grows: %.1f MiB, then %.1f MiB' % (middle, last))
            check(heap < 192, 'the heap has grown by %d KiB' % heap)
            check(server.logged('cannot accept') or not hogs, 'descriptors did not run out')
            print('    RSS %.1f MiB in the middle third, %.1f in the last, %.1f at most; heap in the end %+d KiB; '
                  'descriptors %d at most, %d in the end' % (middle, last, end['peak'] / MIB, heap,
                                                             max(n for _, _, n in samples), end['files']))
            compare(check, client, upstream if mode == 'proxy' else server)
    return check


def selftest(args, folder, faults):
    missed = []
    for fault in faults or FAULTS:
        complaints = soak(args, folder, 6, 'select', fault, IDLE if fault == 'stall' else 1, 0)
        noticed = all(any(what in complaint for complaint in complaints) for what in FAULTS[fault])
        print('--> %s is %s' % (fault, 'noticed' if noticed else 'MISSED'), flush=True)
        missed += [] if noticed else [fault]
    return missed


def built(name, folder):
    program, compiler = os.path.join(folder, name), os.environ.get('CXX', 'c++')
    if not shutil.which(compiler):
        raise Lacking('there is no ' + compiler)
    sources = ['tests/soak/%s.cpp' % name] + ['asyncore.cpp', 'smtpd.cpp'] * (name == 'soak_server')
    subprocess.run([compiler, '-std=c++17', '-O2', '-I.', '-pthread', '-o', program, *sources], cwd=TOP, check=True)
    return program


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['load', 'soak', 'selftest'])
    parser.add_argument('which', nargs='*')
    parser.add_argument('-t', '--time', type=int, default=60)
    parser.add_argument('--seed', type=int, default=1)
    for option, modes in ('poll', ['poll']), ('proxy', ['proxy']), ('all', ['select', 'poll', 'proxy']):
        parser.add_argument('--' + option, dest='modes', action='store_const', const=modes, default=['select'])
    for program in ('server', 'client'):
        parser.add_argument('--' + program)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # servers are stopped on the way out
    failures = []
    try:
        if sys.platform != 'linux':
            raise Lacking('this is not Linux')
        with tempfile.TemporaryDirectory() as folder:
            args.server = args.server or built('soak_server', folder)
            args.client = args.client or built('soak_client', folder)
            for program in (args.server, args.client):
                if not os.access(program, os.X_OK):
                    raise Lacking('there is no ' + program)
            if args.what == 'load':
                for count in args.which or (1000, 10000):
                    failures += load(args, folder, int(count))
            elif args.what == 'soak':
                for mode in args.modes:
                    failures += soak(args, folder, args.time // len(args.modes), mode)
            else:
                failures += selftest(args, folder, args.which)
    except RuntimeError as error:
        failures.append(str(error))
        print('FAILED  %s' % error)
    except Lacking as lacking:
        print('skipped: %s' % lacking)
        return 1 if failures or os.environ.get('NO_SKIP') == '1' else 77
    print('%d failures' % len(failures) if failures else 'all is well')
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())

#!/usr/bin/env python3
"""The bench: our server against its peers, in the same run.

    tests/bench/bench.py [--quick] [--rounds N] [--cases 1,2,7] [--peers ours,smtp-sink] [--out DIR]

Builds bench_server, bare and load (see the head of each .cpp), installs nodemailer's smtp-server with npm in a
cache folder outside the tree, and runs every case with every peer: a fresh server process, a short warm-up that
is not counted, then the messages. The peers take turns within each round, so that a busy moment of the machine
hits them all; a figure is the median over the rounds of the ratio within a round.

Server CPU is the process's own CPU clock (user and system, all its threads, and its children's), read right
before and right after the messages; wall time is the client's; peak RSS is VmHWM, reset before the messages.
The server and the client each have one CPU to themselves when the machine has two.

Writes results.md (ratios), results.csv (raw figures) and results.svg (a chart, by gnuplot) to DIR, by default
tests/bench/results. A peer whose program is missing is named and left out; with --strict that is an error.
"""
import argparse
import collections
import copy
import csv
import functools
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
CACHE = os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'smtpd-bench')
NPM_PACKAGE = 'smtp-server@3'
CPYTHON = '/usr/bin/python3'      # Debian's, the last one that has smtpd
MIB = 1 << 20
OTHERS_LIMIT = 0.04               # a run is repeated when other processes took more of the machine than this


class Failed(Exception):
    """One run of one peer did not work out."""


# ---- Programs ------------------------------------------------------------------------------------------

def newer(target, sources):
    return os.path.exists(target) and all(os.path.getmtime(s) <= os.path.getmtime(target) for s in sources)


@functools.lru_cache(maxsize=None)
def build(name, *sources):
    """Compiles a program into the cache folder unless it is there already; returns its path."""
    target = os.path.join(CACHE, name)
    headers = [os.path.join(TOP, n) for n in os.listdir(TOP) if n.endswith('.hpp')]
    if not newer(target, [*sources, *headers]):
        os.makedirs(CACHE, exist_ok=True)
        compiler = os.environ.get('CXX', 'g++').split()
        if subprocess.run([*compiler, '-std=c++17', '-O2', '-I' + TOP, '-o', target, *sources]).returncode:
            sys.exit('bench: %s does not compile' % name)
    return target


def build_ours():
    return build('bench_server', os.path.join(HERE, 'bench_server.cpp'), os.path.join(TOP, 'smtpd.cpp'),
                 os.path.join(TOP, 'asyncore.cpp'))


def build_own_tool(name):
    return build(name, os.path.join(HERE, name + '.cpp'))


def postfix_program(name):
    path = shutil.which(name, path=os.environ.get('PATH', '') + ':/usr/sbin:/sbin')
    if path is None:
        raise Failed(name + ' is not installed (package postfix)')
    return path


def install_nodemailer():
    if shutil.which('node') is None or shutil.which('npm') is None:
        raise Failed('node and npm are not installed')
    modules = os.path.join(CACHE, 'npm', 'node_modules')
    if not os.path.isdir(os.path.join(modules, 'smtp-server')):
        os.makedirs(os.path.dirname(modules), exist_ok=True)
        subprocess.run(['npm', 'install', '--silent', '--no-audit', '--no-fund', '--prefix', os.path.dirname(modules),
                        NPM_PACKAGE], check=True, stdout=subprocess.DEVNULL)
    return modules


def drop_root():
    """What smtp-sink wants on its command line when it is started by root."""
    return ['-u', 'nobody'] if os.geteuid() == 0 else []


# ---- Peers: each makes the command line of a server on a port ---------------------------------------------

# threads: it has threads that need a CPU besides its main one (a JIT compiler's, a collector's).
Command = collections.namedtuple('Command', 'argv env threads', defaults=(None, False))


def ours(*flags):
    return lambda port: Command([build_ours(), *flags, str(port)])


def bare(*flags):
    return lambda port: Command([build_own_tool('bare'), *flags, str(port)])


def smtp_sink(port):
    return Command([postfix_program('smtp-sink'), *drop_root(), '-m', '12000', '127.0.0.1:%d' % port, '4096'])


def cpython(*flags):
    def command(port):
        if subprocess.run([CPYTHON, '-W', 'ignore', '-c', 'import smtpd'], stderr=subprocess.DEVNULL).returncode:
            raise Failed('%s has no smtpd (it needs Python 3.11)' % CPYTHON)
        return Command([CPYTHON, '-W', 'ignore', os.path.join(HERE, 'peers', 'cpython.py'), *flags, str(port)])
    return command


def aiosmtpd(port):
    if subprocess.run([CPYTHON, '-c', 'import aiosmtpd'], stderr=subprocess.DEVNULL).returncode:
        raise Failed('aiosmtpd is not installed (package python3-aiosmtpd)')
    return Command([CPYTHON, os.path.join(HERE, 'peers', 'aiosmtpd_server.py'), str(port)])


def nodemailer(port):
    return Command(['node', os.path.join(HERE, 'peers', 'nodemailer.js'), str(port)],
                   dict(os.environ, NODE_PATH=install_nodemailer()), threads=True)


PEERS = {
    'ours': ours(),
    'ours, poll': ours('--poll'),
    'bare, select': bare(),
    'bare, poll': bare('--poll'),
    'bare, store': bare('--store'),
    'smtp-sink': smtp_sink,
    'CPython': cpython('--backlog', '128'),
    'CPython, poll': cpython('--backlog', '128', '--poll'),
    'CPython, backlog 5': cpython('--backlog', '5'),
    'aiosmtpd': aiosmtpd,
    'nodemailer': nodemailer,
}
# Case 10: these need to know where the mail goes.
PROXIES = {
    'ours': lambda sink: ours('--proxy', '127.0.0.1:%d' % sink),
    'bare, forward': lambda sink: bare('--forward', '127.0.0.1:%d' % sink),
    'CPython': lambda sink: cpython('--backlog', '128', '--proxy', '127.0.0.1:%d' % sink),
    'Postfix': None,    # its own class, below
}

# ---- Cases -----------------------------------------------------------------------------------------------


class Case:
    client = 'load'

    def __init__(self, key, title, peers, load, *, reference='smtp-sink', messages=None, source=None, bare='bare, select',
                 slow=(), message_size=1024):
        self.key = key                      # '1', '5, SIZE declared'
        self.number = int(re.match(r'\d+', key).group())
        self.title = title
        self.peers = peers
        self.load = load                    # arguments of our load generator, -n excepted
        self.source = source                # the same for smtp-source, where it can do the case
        self.reference = reference          # the peer that throughput and CPU are divided by
        self.messages = messages            # None: as many as fit the time of a run
        self.bare = bare                    # the limit
        self.slow = slow                    # peers that run once only: they take minutes to get ready
        self.message_size = message_size

    def with_smtp_source(self):
        """The same case with the other client, for the peers that either client can keep busy."""
        other = copy.copy(self)
        other.client = 'smtp-source'
        other.key += ', smtp-source'
        other.title += '; client: smtp-source'
        other.peers = [p for p in self.peers if p.split(',')[0] in ('ours', 'smtp-sink', 'bare')]
        return other


SMALL = ['ours', 'smtp-sink', 'bare, select', 'CPython', 'aiosmtpd', 'nodemailer']
LARGE = ['ours', 'smtp-sink', 'bare, select', 'bare, store', 'CPython', 'aiosmtpd', 'nodemailer']
IDLE = ['ours', 'ours, poll', 'smtp-sink', 'bare, select', 'bare, poll', 'CPython', 'CPython, poll', 'aiosmtpd',
        'nodemailer']
CASES = [
    Case('1', '1 KiB messages, a connection each, 20 parallel', SMALL + ['CPython, backlog 5'],
         ['-c', '20'], source=['-s', '20', '-l', '1024']),
    Case('2', '1 KiB messages, 20 kept connections', SMALL,
         ['-k', '-c', '20'], source=['-d', '-s', '20', '-l', '1024']),
    Case('3', '1 KiB messages, one serial client, EHLO, a connection each', SMALL + ['CPython, backlog 5'],
         ['-c', '1', '--ehlo']),
    Case('4', '1 MiB messages, 4 kept connections', LARGE, ['-k', '-c', '4', '-s', str(MIB)],
         source=['-d', '-s', '4', '-l', str(MIB)], bare='bare, store', message_size=MIB),
    Case('5, SIZE declared', 'one 32 MiB message, SIZE declared', LARGE, ['-c', '1', '-s', str(32 * MIB), '--size'],
         messages=1, bare='bare, store', message_size=32 * MIB),
    Case('5, no SIZE', 'one 32 MiB message, SIZE not declared', LARGE, ['-c', '1', '-s', str(32 * MIB)],
         messages=1, source=['-s', '1', '-l', str(32 * MIB)], bare='bare, store', message_size=32 * MIB),
    Case('6', '200 recipients, 1 KiB, 20 kept connections', SMALL, ['-k', '-c', '20', '-r', '200'],
         source=['-d', '-s', '20', '-r', '200', '-l', '1024']),
    Case('7', '1,000 connections open, 20 of them active', IDLE, ['-k', '-c', '20', '--idle', '980']),
    Case('8', '10,000 connections open, 20 of them active',
         ['ours, poll', 'smtp-sink', 'bare, poll', 'CPython, poll', 'aiosmtpd', 'nodemailer'],
         ['-k', '-c', '20', '--idle', '9980'], bare='bare, poll', slow=['CPython, poll', 'nodemailer', 'aiosmtpd']),
    Case('9', '1 KiB messages, pipelined commands, 20 kept connections', SMALL, ['-k', '-c', '20', '--pipeline']),
    Case('10', 'relaying 1 KiB messages into smtp-sink, a connection each, 20 parallel', list(PROXIES),
         ['-c', '20'], reference='Postfix', bare='bare, forward'),
    Case('11', 'start-up: from exec to the first 220', SMALL, None, messages=1),
]

# ---- Watching a process ------------------------------------------------------------------------------------


def family(pid):
    """The process and all its descendants."""
    children = collections.defaultdict(list)
    for name in os.listdir('/proc'):
        if name.isdigit():
            try:
                with open('/proc/%s/stat' % name) as f:
                    children[int(f.read().rsplit(')', 1)[1].split()[1])].append(int(name))
            except OSError:
                pass
    found = [pid]
    for each in found:
        found.extend(children[each])
    return found


def reaped_cpu(pid):
    """CPU seconds of the children that have ended."""
    with open('/proc/%d/stat' % pid) as f:
        fields = f.read().rsplit(')', 1)[1].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf('SC_CLK_TCK')


def cpu_seconds(pids):
    """User and system time so far. The process's CPU clock counts nanoseconds where /proc counts ticks."""
    total = 0.0
    for pid in pids:
        try:
            total += time.clock_gettime((~pid << 3) | 2) + reaped_cpu(pid)
        except OSError:
            pass
    return total


def machine_cpu():
    """CPU seconds that the whole machine has worked so far: user, nice, system, interrupts and stolen."""
    with open('/proc/stat') as f:
        ticks = [int(n) for n in f.readline().split()[1:]]
    return sum(ticks[i] for i in (0, 1, 2, 5, 6, 7)) / os.sysconf('SC_CLK_TCK')


def memory(pids, field):
    """The sum over the processes of a field of /proc/PID/status, in bytes."""
    total = 0
    for pid in pids:
        try:
            with open('/proc/%d/status' % pid) as f:
                found = re.search(field + r':\s+(\d+) kB', f.read())
            total += int(found.group(1)) * 1024 if found else 0
        except OSError:
            pass
    return total


def reset_peak(pids):
    for pid in pids:
        try:
            with open('/proc/%d/clear_refs' % pid, 'w') as f:
                f.write('5')
        except OSError:
            pass


# ---- Ports and processes ------------------------------------------------------------------------------------


def free_port():
    """A port below the range that connections take theirs from."""
    while True:
        port = random.randint(20000, 32000)
        with socket.socket() as s:
            try:
                s.bind(('127.0.0.1', port))
                return port
            except OSError:
                pass


def wait_220(port, process=None, limit=30):
    until = time.monotonic() + limit
    while time.monotonic() < until:
        if process is not None and process.poll() is not None:
            raise Failed('the server ended with status %d' % process.returncode)
        try:
            with socket.create_connection(('127.0.0.1', port), timeout=limit) as s, s.makefile('rb') as f:
                if not f.readline().startswith(b'220'):
                    raise Failed('no 220 greeting')
                s.sendall(b'QUIT\r\n')
                f.readline()
                return
        except ConnectionError:
            time.sleep(0.01)
    raise Failed('the server does not listen')


class Pinning:
    """One CPU for the server and one for the client, when there are two."""

    def __init__(self, wanted, realtime):
        self.realtime = realtime
        cpus = sorted(os.sched_getaffinity(0))
        self.on = wanted and len(cpus) > 1
        self.server, self.client = ({cpus[0]}, {cpus[1]}) if self.on else (None, None)

    def prepare(self, cpus):
        """Done in the child, before exec."""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        if cpus:
            os.sched_setaffinity(0, cpus)
        if self.realtime:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))

    def start(self, argv, cpus, **options):
        return subprocess.Popen(argv, preexec_fn=lambda: self.prepare(cpus), **options)


def stop(process):
    if process.poll() is None:
        process.kill()
    process.wait()


class Server:
    """A peer as a process, on a port."""

    def __init__(self, command, pinning, cpus):
        self.port = free_port()
        argv, env, threads = command(self.port)
        self.process = pinning.start(argv, None if threads else cpus, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                     stderr=subprocess.DEVNULL)
        try:
            wait_220(self.port, self.process)
        except Failed:
            self.stop()
            raise

    def pids(self):
        return family(self.process.pid)

    def stop(self):
        stop(self.process)


MAIN_CF = """compatibility_level = 3.6
queue_directory = {home}/queue
data_directory = {home}/data
mail_owner = postfix
setgid_group = postdrop
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = bench.localdomain
mydestination =
mynetworks = 127.0.0.0/8
local_recipient_maps =
alias_maps =
alias_database =
relayhost = [127.0.0.1]:{sink}
smtp_dns_support_level = disabled
smtp_host_lookup = native
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_peername_lookup = no
smtpd_client_connection_count_limit = 0
"""

MASTER_CF = """127.0.0.1:{port} inet n - n - 100 smtpd
cleanup   unix  n - n - 0 cleanup
qmgr      unix  n - n 300 1 qmgr
rewrite   unix  - - n - - trivial-rewrite
bounce    unix  - - n - 0 bounce
defer     unix  - - n - 0 bounce
trace     unix  - - n - 0 bounce
verify    unix  - - n - 1 verify
flush     unix  n - n 1000? 0 flush
proxymap  unix  - - n - - proxymap
smtp      unix  - - n - - smtp
relay     unix  - - n - - smtp
error     unix  - - n - - error
retry     unix  - - n - - error
discard   unix  - - n - - discard
anvil     unix  - - n - 1 anvil
scache    unix  - - n - 1 scache
tlsmgr    unix  - - n 1000? 1 tlsmgr
"""


class Postfix:
    """Postfix with a configuration and a queue of its own, on high ports, that relays everything to the sink."""

    def __init__(self, sink, pinning):
        postfix_program('postfix')
        self.prepare = lambda: pinning.prepare(None)
        if os.geteuid() != 0:
            raise Failed('Postfix can only be started by root')
        self.port = free_port()
        self.home = tempfile.mkdtemp(prefix='smtpd-bench-')
        os.chmod(self.home, 0o755)
        for name in ('queue', 'data'):
            os.mkdir(os.path.join(self.home, name))
        shutil.chown(os.path.join(self.home, 'data'), 'postfix')
        for name, text in (('main.cf', MAIN_CF), ('master.cf', MASTER_CF)):
            with open(os.path.join(self.home, name), 'w') as f:
                f.write(text.format(home=self.home, port=self.port, sink=sink))
        try:
            self.call('start')
            wait_220(self.port)
            with open(os.path.join(self.home, 'queue', 'pid', 'master.pid')) as f:
                self.master = int(f.read())
        except (Failed, OSError, subprocess.SubprocessError):
            self.stop()
            raise

    def call(self, verb):
        return subprocess.run([postfix_program('postfix'), '-c', self.home, verb], stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60,
                              preexec_fn=self.prepare).returncode

    def pids(self):
        return family(self.master)

    def stop(self):
        self.call('stop')
        shutil.rmtree(self.home, ignore_errors=True)


# ---- One run ---------------------------------------------------------------------------------------------

# `others` is the share of the machine that processes of no concern to the bench took meanwhile.
Sample = collections.namedtuple('Sample', 'messages wall cpu client_cpu idle_rss peak_rss others')


class Bench:
    def __init__(self, args):
        self.args = args
        self.pinning = Pinning(not args.no_pin, args.realtime)
        self.loader = build_own_tool('load')

    def run(self, case, peer, messages, warm_up):
        """One peer, one case, once; again when something else kept the machine busy."""
        sample = self.run_once(case, peer, messages, warm_up)
        for _ in range(0 if peer in case.slow else self.args.retries):
            if sample.others <= OTHERS_LIMIT:
                break
            again = self.run_once(case, peer, messages, warm_up)
            sample = min(sample, again, key=lambda s: s.others)
        return sample

    def run_once(self, case, peer, messages, warm_up):
        if case.number == 11:
            return self.start_up(peer)
        if case.number == 10:
            return self.relay(case, peer, messages, warm_up)
        server = Server(PEERS[peer], self.pinning, self.pinning.server)
        try:
            self.warm_up(case, server.port, warm_up)
            return self.measure(case, server, messages)
        finally:
            server.stop()

    def warm_up(self, case, port, messages):
        connections = case.load[case.load.index('-c') + 1]
        done = subprocess.run([self.loader, '-k', '-c', connections, '-n', str(messages), '127.0.0.1:%d' % port],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=self.args.limit)
        if done.returncode:
            raise Failed('does not finish')

    def measure(self, case, server, messages, bystanders=(), delivered=None):
        if case.client == 'smtp-source':
            return self.measure_source(case, server, messages, bystanders, delivered)
        argv = [self.loader, '--gate', *case.load, '-n', str(messages), '127.0.0.1:%d' % server.port]
        client = self.pinning.start(argv, self.pinning.client, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        guard = Alarm(self.args.limit, client)
        try:
            with guard:
                if client.stdout.readline() != 'ready\n':
                    raise Failed('the client did not get ready')
                before = Watch(server, client.pid, *bystanders)
                print(file=client.stdin, flush=True)
                result = dict(re.findall(r'(\w+)=([\d.]+)', client.stdout.readline()))
                if not result:
                    raise Failed('does not finish' if guard.rang else 'the client failed')
                wall = float(result['seconds'])
                if delivered:
                    wall = delivered()
                return before.sample(messages, wall, float(result['cpu']))
        finally:
            stop(client)
            client.stdin.close()
            client.stdout.close()

    def measure_source(self, case, server, messages, bystanders, delivered):
        argv = [postfix_program('smtp-source'), *case.source, '-m', str(messages), '127.0.0.1:%d' % server.port]
        before = Watch(server, *bystanders)
        client = self.pinning.start(argv, self.pinning.client, stderr=subprocess.DEVNULL)
        with Alarm(self.args.limit, client):
            _, status, usage = os.wait4(client.pid, 0)
        client.returncode = status
        wall = time.monotonic() - before.time
        if status != 0:
            raise Failed('smtp-source failed')
        if delivered:
            wall = delivered()
        client_cpu = usage.ru_utime + usage.ru_stime
        return before.sample(messages, wall, client_cpu, client_cpu)

    def relay(self, case, peer, messages, warm_up):
        """Case 10. Postfix answers before it relays, so its time ends when the sink has the last message."""
        queued = peer == 'Postfix'
        sink_port = free_port()
        sink = self.start_sink(sink_port, warm_up if queued else None)
        server = None
        try:
            server = Postfix(sink_port, self.pinning) if queued else Server(PROXIES[peer](sink_port), self.pinning, None)
            self.warm_up(case, server.port, warm_up)
            if not queued:
                return self.measure(case, server, messages, [sink.pid])
            sink.wait(timeout=self.args.limit)
            sink = self.start_sink(sink_port, messages)
            start = time.monotonic()

            def delivered():
                sink.wait(timeout=self.args.limit)
                return time.monotonic() - start
            return self.measure(case, server, messages, [sink.pid], delivered)
        except subprocess.TimeoutExpired:
            raise Failed('does not finish') from None
        finally:
            if server is not None:
                server.stop()
            stop(sink)

    def start_sink(self, port, count):
        """smtp-sink; with a count it ends when it has that many messages."""
        ending = ['-M', str(count)] if count else []
        argv = [postfix_program('smtp-sink'), *drop_root(), *ending, '-m', '1000', '127.0.0.1:%d' % port, '4096']
        sink = self.pinning.start(argv, None, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL)
        try:
            wait_220(port, sink)
        except Failed:
            stop(sink)
            raise
        return sink

    def start_up(self, peer):
        port = free_port()
        argv, env, _ = PEERS[peer](port)
        command = [self.loader, '--wait-220', '127.0.0.1:%d' % port, '--', *argv]
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=60)
        found = re.search(r'seconds=([\d.]+)', done.stdout)
        if not found:
            raise Failed('the server did not start')
        return Sample(1, float(found.group(1)), 0.0, 0.0, 0, 0, 0.0)


class Alarm:
    """Ends a client that takes too long."""

    def __init__(self, seconds, process):
        self.seconds, self.process, self.rang = seconds, process, False

    def __enter__(self):
        signal.signal(signal.SIGALRM, self.ring)
        signal.alarm(self.seconds)

    def ring(self, *_):
        self.rang = True
        self.process.kill()

    def __exit__(self, *_):
        signal.alarm(0)


class Watch:
    """A server's CPU and memory from here on, and what else the machine does."""

    def __init__(self, server, *others_of_ours):
        self.server = server
        self.ours = [os.getpid(), *others_of_ours]
        pids = server.pids()
        reset_peak(pids)
        self.idle = memory(pids, 'VmRSS')
        self.machine = machine_cpu()
        self.ours_cpu = cpu_seconds(self.ours)
        self.cpu = cpu_seconds(pids)
        self.time = time.monotonic()

    def sample(self, messages, wall, client_cpu, gone_cpu=0.0):
        """gone_cpu: what a process that has ended, and is not watched, took."""
        cpu_now = cpu_seconds(self.server.pids())
        known = cpu_now - self.cpu + cpu_seconds(self.ours) - self.ours_cpu + gone_cpu
        took = (time.monotonic() - self.time) * os.cpu_count()
        others = max(0.0, machine_cpu() - self.machine - known - 2 / os.sysconf('SC_CLK_TCK')) / took
        return Sample(messages, wall, cpu_now - self.cpu, client_cpu, self.idle,
                      memory(self.server.pids(), 'VmHWM'), others)


# ---- All runs --------------------------------------------------------------------------------------------


class Results:
    """Samples by case and peer, in the order of the rounds."""

    def __init__(self):
        self.samples = collections.defaultdict(list)   # (case key, peer) -> [Sample or None]
        self.failed = {}                               # (case key, peer) -> why

    def values(self, case, peer, what):
        """One number per round; None where the peer has no sample."""
        return [what(s) if s else None for s in self.samples.get((case.key, peer), [])]

    def ratio(self, case, peer, other, what):
        """The median over the rounds of the ratio within a round."""
        pairs = zip(self.values(case, peer, what), self.values(case, other, what))
        found = [a / b for a, b in pairs if a is not None and b]
        return statistics.median(found) if found else None

    def median(self, case, peer, what):
        found = [v for v in self.values(case, peer, what) if v is not None]
        return statistics.median(found) if found else None


def rate(s):
    return s.messages / s.wall


def cpu(s):
    return s.cpu / s.messages


def plan(bench, case, peer):
    """How many messages fill the time of a run, and how many warm the peer up."""
    if case.messages:
        return case.messages, 1
    floor = {3: 5, 4: 8, 6: 20}.get(case.number, 40)
    messages = floor
    while True:
        sample = bench.run(case, peer, messages, 20)
        wanted = int(rate(sample) * bench.args.seconds)
        if sample.wall > 0.1 or peer in case.slow:      # long enough to tell
            break
        messages = max(wanted // 4, 2 * messages)
    return min(max(wanted, floor), 60000), min(max(wanted // 10, 20), 2000)


def run_case(bench, case, peers, results, report):
    plans = {}
    for number in range(bench.args.rounds):
        # Another one begins in each round.
        for peer in peers[number % len(peers):] + peers[:number % len(peers)]:
            key = (case.key, peer)
            sample = None
            if key not in results.failed and not (number > 0 and peer in case.slow):
                try:
                    if peer not in plans:
                        plans[peer] = plan(bench, case, peer)
                    sample = bench.run(case, peer, *plans[peer])
                    report.writerow([case.key, peer, case.client, number + 1, sample.messages,
                                     '%.6f' % sample.wall, '%.6f' % sample.cpu, '%.6f' % sample.client_cpu,
                                     sample.idle_rss, sample.peak_rss, '%.3f' % sample.others])
                except (Failed, OSError, subprocess.SubprocessError) as error:
                    results.failed[key] = str(error)
                    print('case %s: %s: %s' % (case.key, peer, error), file=sys.stderr)
            results.samples[key].append(sample)


# ---- What comes out --------------------------------------------------------------------------------------


def show(value, form='%.2f'):
    return '-' if value is None else form % value


def percent(value):
    return '-' if value is None else '%.0f %%' % (100 * value)


def table(head, rows):
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    return '\n'.join(lines + ['| ' + ' | '.join(row) + ' |' for row in rows]) + '\n'


def case_table(case, peers, results):
    """Each peer's figures, over those of the reference."""
    ref = case.reference
    rows = []
    for peer in peers:
        why = results.failed.get((case.key, peer))
        if case.number == 11:
            rows.append([peer, why or show(results.ratio(case, peer, ref, lambda s: s.wall))])
            continue
        row = [peer, why or show(results.ratio(case, peer, ref, rate)), show(results.ratio(case, peer, ref, cpu)),
               show(results.ratio(case, peer, case.bare, cpu)),
               show(results.median(case, peer, lambda s: s.peak_rss / MIB), '%.1f'),
               percent(results.median(case, peer, lambda s: s.cpu / s.wall)),
               percent(results.median(case, peer, lambda s: s.client_cpu / s.wall))]
        if case.number == 5:
            row.append(show(results.median(case, peer, lambda s: (s.peak_rss - s.idle_rss) / case.message_size)))
        rows.append(row)
    if case.number == 11:
        head = ['', 'time ÷ %s' % ref]
    else:
        head = ['', 'throughput ÷ %s' % ref, 'CPU per message ÷ %s' % ref, 'CPU per message ÷ ' + case.bare,
                'peak RSS, MiB', 'server busy', 'client busy']
        if case.number == 5:
            head.append('RSS growth ÷ message')
    return table(head, rows)


def summary_table(cases, results):
    """One line a case: throughput over the reference's, and our CPU over its and the bare program's."""
    rows = []
    for case in cases:
        if case.client != 'load' or case.number == 11:
            continue
        rate_of = lambda name: show(results.ratio(case, chart_peer(case, name, results), case.reference, rate))
        ours = chart_peer(case, 'ours', results)
        rows.append(['%d: %s' % (case.number, case.title), '**%s**' % rate_of('ours')] +
                    [rate_of(name) for name in ('bare', 'CPython', 'aiosmtpd', 'nodemailer')] +
                    [show(results.ratio(case, ours, other, cpu)) for other in (case.reference, case.bare)])
    return rows and table(['throughput ÷ that of smtp-sink (10: Postfix)', 'ours', 'bare', 'CPython', 'aiosmtpd', 'nodemailer',
                           'our CPU ÷ its', 'our CPU ÷ bare'], rows)


class Target:
    """What is asked of us: a ratio and its bound."""

    def __init__(self, cases, text, bound, figure, at_least=True):
        self.cases, self.text, self.bound, self.figure, self.at_least = cases, text, bound, figure, at_least


def over(what, other, mine='ours'):
    return lambda r, c: r.ratio(c, mine, other, what)


def under(what, other, mine='ours'):
    return lambda r, c: r.ratio(c, other, mine, what)


def growth(r, c):
    return r.median(c, 'ours', lambda s: (s.peak_rss - s.idle_rss) / c.message_size)


TARGETS = [
    Target('123', 'throughput ÷ smtp-sink', 1.0, over(rate, 'smtp-sink')),
    Target('123', 'CPU ÷ smtp-sink', 1.0, over(cpu, 'smtp-sink'), False),
    Target('123', 'CPU ÷ bare', 1.5, over(cpu, 'bare, select'), False),
    Target('45', 'throughput ÷ smtp-sink', 3.0, over(rate, 'smtp-sink')),
    Target('45', 'throughput ÷ bare that stores', 0.8, over(rate, 'bare, store')),
    Target('7', 'throughput ÷ bare select', 0.85, over(rate, 'bare, select')),
    Target('7', 'poll: throughput ÷ bare poll', 0.85, over(rate, 'bare, poll', 'ours, poll')),
    Target('8', 'poll: throughput ÷ bare poll', 0.85, over(rate, 'bare, poll', 'ours, poll')),
    Target('1', "CPython's CPU ÷ ours", 4.0, under(cpu, 'CPython')),
    Target('2', "CPython's CPU ÷ ours", 6.0, under(cpu, 'CPython')),
    Target('123', "aiosmtpd's CPU ÷ ours", 10.0, under(cpu, 'aiosmtpd')),
    Target(['5, SIZE declared'], 'RSS growth ÷ message', 1.3, growth, False),
    Target(['5, no SIZE'], 'RSS growth ÷ message', 2.2, growth, False),
]


def target_table(cases, results):
    rows = []
    for target in TARGETS:
        for case in cases:
            wanted = case.key in target.cases or str(case.number) in target.cases
            if not wanted or case.client != 'load':     # smtp-source is a limit of its own, see the notes
                continue
            got = target.figure(results, case)
            if got is not None:
                met = got >= target.bound if target.at_least else got <= target.bound
                rows.append([case.key, target.text, '%s %g' % ('≥' if target.at_least else '≤', target.bound), '%.2f' % got,
                             'yes' if met else '**no**'])
    return table(['case', 'figure', 'target', 'reached', 'met'], rows) if rows else ''


def version(argv, pattern):
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError:
        return '-'
    found = re.search(pattern, done.stdout)
    return found.group(1) if found else '-'


def versions():
    node_package = os.path.join(CACHE, 'npm', 'node_modules', 'smtp-server', 'package.json')
    compiler = os.environ.get('CXX', 'g++').split()[0]
    return ', '.join([
        'Postfix ' + version(['/usr/sbin/postconf', '-d', 'mail_version'], r'= (\S+)'),
        'CPython ' + version([CPYTHON, '--version'], r'Python (\S+)'),
        'aiosmtpd ' + version([CPYTHON, '-c', 'import aiosmtpd; print(aiosmtpd.__version__)'], r'(\S+)'),
        "nodemailer's smtp-server " + version(['cat', node_package], r'"version": "([^"]+)"') +
        ' on Node.js ' + version(['node', '--version'], r'v(\S+)'),
        compiler + ' ' + version([compiler, '-dumpfullversion', '-dumpversion'], r'(\S+)') + ' -O2',
        'Linux %s, %s, %d CPUs' % (os.uname().release.split('-')[0], os.uname().machine, os.cpu_count()),
    ])


NOTES = """- Ratios: the median over the rounds of the ratio within a round. CPU is the server's, user and system.
- *busy* is CPU time over wall time. Where the client is busy all the time and the server is not, the client is the
  limit, and the throughput says little: look at the CPU.
- The client is our load generator (load.cpp) where the table says nothing else. smtp-source does the same work in the
  tables that name it; with a server that is faster than smtp-sink it is busy all the time, so that all servers look
  alike (cases 1, 2, 6), or it waits 40 ms for an ACK before its last bytes (case 4). The last table compares the two.
- *bare* parses nothing: it exchanges the same bytes in the same number of turns (bare.cpp). It is the limit, not a server.
- In cases 7 and 8 aiosmtpd and nodemailer wait with epoll, so idle connections cost them little. smtp-sink does too,
  but it keeps 128 KiB for each connection, and a sorted list of their timeouts that it walks for each event.
- CPython as it is, with its backlog of 5, loses connections when 20 come at once; *CPython* has a backlog of 128.
- CPython sends each line of a reply by itself: with EHLO, and with pipelining, every reply meets Nagle's algorithm and
  the client's delayed ACK (about 40 ms).
- nodemailer greets after 100 ms on purpose (early talkers): that bounds its throughput wherever each message
  has its connection, and its start-up time.
- The server has a CPU to itself and the client too, but for nodemailer, whose compiler and collector have threads of their
  own, and but for case 10, where the sink works as well.
- In case 8, CPython, aiosmtpd and nodemailer run in one round only: opening 10,000 connections takes them long.
- Case 10: Postfix queues on disk and answers before it relays; its time ends when the sink has the last message.
"""


def write_markdown(path, cases, peers_of, results, args):
    with open(path, 'w') as f:
        print('# Results of the bench\n', file=f)
        print('`make bench`: %d rounds of about %g s%s. %s.\n' % (
            args.rounds, args.seconds, '' if args.no_pin else ', server and client on a CPU each', versions()), file=f)
        shares = [s.others for samples in results.samples.values() for s in samples if s]
        if shares:
            print('Other processes took %s of the machine in the median run, %s in the worst.\n' % (
                percent(statistics.median(shares)), percent(max(shares))), file=f)
        summary = summary_table(cases, results)
        if summary:
            print('## Summary\n\n%s' % summary, file=f)
        targets = target_table(cases, results)
        if targets:
            print('## Targets\n\n%s' % targets, file=f)
        for case in cases:
            print('## %s: %s\n\n%s' % (case.key, case.title, case_table(case, peers_of[case.key], results)), file=f)
        clients = compare_clients(cases, results)
        if clients:
            print('## The clients compared\n\n%s' % clients, file=f)
        print('## Notes\n\n%s' % NOTES, file=f)


CHART = r"""set terminal svg size 1000,760 font "sans-serif,13" background "#ffffff" enhanced
set output "{path}"
set multiplot layout 2,1 margins 0.06,0.99,0.09,0.89 spacing 0.0,0.17
set style data histograms
set style histogram clustered gap 1.2
set style fill solid 0.9 noborder
set boxwidth 1.0
set logscale y
set datafile missing "-"
set grid ytics lc rgb "#dddddd"
set border 3 lc rgb "#888888"
set tics nomirror scale 0.5
set format y "%g"
set key at screen 0.52,0.985 center top horizontal samplen 1 font ",12"
set title "Throughput, smtp-sink = 1 (more is better)" offset 0,-0.5
{plot_rate}
unset key
set yrange [0.01:*]
set title "Server CPU per message, smtp-sink = 1 (less is better)" offset 0,-0.5
{plot_cpu}
unset multiplot
"""
LABELS = {'1': 'a connection\\neach', '2': 'kept', '3': 'serial', '4': '1 MiB', '5, SIZE declared': '32 MiB,\\nSIZE declared',
          '5, no SIZE': '32 MiB', '6': '200\\nrecipients', '7': '1,000\\nopen', '8': '10,000\\nopen', '9': 'pipelined'}
COLOURS = {'ours': '#0b6e4f', 'smtp-sink': '#9aa0a6', 'bare': '#d0d3d6', 'CPython': '#3b6fb6', 'aiosmtpd': '#e0a030',
           'nodemailer': '#b5483a'}


def chart_peer(case, name, results):
    """The peer that stands for a name in a case: case 8 has only poll, cases 4 and 5 the bare program that stores."""
    wanted = {'ours': ['ours', 'ours, poll'], 'CPython': ['CPython', 'CPython, poll'], 'bare': [case.bare]}.get(name, [name])
    return next((p for p in wanted if results.median(case, p, rate) is not None), wanted[0])


def write_chart(path, cases, results):
    if shutil.which('gnuplot') is None:
        print('no chart: gnuplot is not installed (package gnuplot-nox)', file=sys.stderr)
        return
    cases = [c for c in cases if c.number <= 9 and c.client == 'load']
    names = [n for n in COLOURS if any(results.median(c, chart_peer(c, n, results), rate) for c in cases)]
    if not names:
        return
    blocks, plots = [], {}
    for what, block in ((rate, 'rate'), (cpu, 'cpu')):
        lines = []
        for case in cases:
            values = [show(results.ratio(case, chart_peer(case, n, results), case.reference, what), '%.4f') for n in names]
            lines.append('"%d: %s" %s' % (case.number, LABELS[case.key], ' '.join(values)))
        blocks.append('$%s << EOD\n%s\nEOD\n' % (block, '\n'.join(lines)))
        columns = ['$%s using %d:xtic(1) title "%s" lc rgb "%s"' % (block, i + 2, n, COLOURS[n]) for i, n in enumerate(names)]
        plots[block] = 'plot ' + ', '.join(columns) + ', 1 notitle with lines lc rgb "#444444"'
    script = ''.join(blocks) + CHART.format(path=path, plot_rate=plots['rate'], plot_cpu=plots['cpu'])
    subprocess.run(['gnuplot'], input=script, text=True, check=True)


# ---- The clients compared ----------------------------------------------------------------------------------


def compare_clients(cases, results):
    """Our load generator against smtp-source: the same server in the same case, in the same run."""
    rows = []
    for other in cases:
        case = next((c for c in cases if c.number == other.number and c.key + ', smtp-source' == other.key), None)
        if case is None:
            continue
        for peer in other.peers:
            def over_other(what):
                pairs = zip(results.values(case, peer, what), results.values(other, peer, what))
                found = [a / b for a, b in pairs if a and b]
                return statistics.median(found) if found else None
            if over_other(rate) is None:
                continue
            shares = [percent(results.median(c, peer, what)) for c in (case, other)
                      for what in (lambda s: s.client_cpu / s.wall, lambda s: s.cpu / s.wall)]
            rows.append([case.key, peer, show(over_other(rate)), show(over_other(cpu)), *shares])
    head = ['case', 'server', 'throughput, load ÷ smtp-source', "server's CPU, load ÷ smtp-source", 'load busy', 'server then',
            'smtp-source busy', 'server then']
    return table(head, rows) if rows else ''


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--rounds', type=int, default=7, help='how often each peer runs each case (7)')
    parser.add_argument('--seconds', type=float, default=1.0, help='about how long a run takes (1)')
    parser.add_argument('--quick', action='store_true', help='2 rounds of 0.2 s: to see that it works')
    parser.add_argument('--cases', help='only these, by number: 1,2,7')
    parser.add_argument('--peers', help='only these: ours,smtp-sink; each stands for its variants too')
    parser.add_argument('--client', choices=['load', 'smtp-source', 'both'], default='both',
                        help='smtp-source: only the cases that it can do (both)')
    parser.add_argument('--limit', type=int, default=300, help='seconds after which a run is given up (300)')
    parser.add_argument('--retries', type=int, default=3,
                        help='how often a run is repeated when other processes keep the machine busy (3)')
    parser.add_argument('--realtime', action='store_true',
                        help='run servers and clients ahead of everything else on a busy machine (root)')
    parser.add_argument('--no-pin', action='store_true', help='do not give server and client a CPU each')
    parser.add_argument('--strict', action='store_true', help='exit with 1 when a peer was left out or a target missed')
    parser.add_argument('--out', default=os.path.join(HERE, 'results'), help='the folder for the results')
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.retries = 2, 0.2, 0
    return args


def main():
    args = arguments()
    numbers = args.cases and [int(n) for n in args.cases.split(',')]
    cases = [c for c in CASES if not numbers or c.number in numbers]
    sourced = [c.with_smtp_source() for c in cases if c.source] if args.client != 'load' else []
    cases = (cases if args.client != 'smtp-source' else []) + sourced
    cases.sort(key=lambda c: c.number)
    bench = Bench(args)
    names = args.peers and args.peers.split(',')
    peers_of = {c.key: [p for p in c.peers if not names or p.split(',')[0] in names] for c in cases}
    results = Results()
    os.makedirs(args.out, exist_ok=True)
    # The results take the places of the last ones when all of them are there: an interrupted run changes nothing.
    part = {kind: os.path.join(args.out, 'results.%s.part' % kind) for kind in ('csv', 'md', 'svg')}
    with open(part['csv'], 'w', newline='') as f:
        report = csv.writer(f, lineterminator='\n')
        report.writerow(['case', 'peer', 'client', 'round', 'messages', 'wall_s', 'server_cpu_s', 'client_cpu_s',
                         'idle_rss_bytes', 'peak_rss_bytes', 'others_share'])
        for case in cases:
            print('case %s: %s' % (case.key, case.title), file=sys.stderr)
            run_case(bench, case, peers_of[case.key], results, report)
            f.flush()
    write_markdown(part['md'], cases, peers_of, results, args)
    write_chart(part['svg'], cases, results)
    for path in part.values():
        if os.path.exists(path):
            os.replace(path, path[:-len('.part')])
    with open(os.path.join(args.out, 'results.md')) as f:
        print(f.read())
    missed = '**no**' in target_table(cases, results)
    return 1 if args.strict and (missed or results.failed) else 0


if __name__ == '__main__':
    sys.exit(main())

#!/usr/bin/env python3
"""What can be counted rather than timed: the same on a busy machine as on an idle one.

    tests/bench/counts.py [--update]

For case 2 of the bench (1 KiB messages over 20 kept connections): the instructions per message by
valgrind --tool=callgrind, and the system calls per message by strace -c, each from the difference of two runs,
so that start-up and connecting don't count. Then the heap that an idle connection takes, and the size of the
stripped smtpd with the processor time that a clean make takes.

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
    args = parser.parse_args()
    for tool in ('valgrind', 'strace'):
        if shutil.which(tool) is None:
            sys.exit('counts: %s is not installed' % tool)
    figures = measure()
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

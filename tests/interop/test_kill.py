#!/usr/bin/env python3
"""What becomes of messages when the proxy is killed, and how much memory one takes.

    test_kill.py PATH_TO_SMTPD

kill     Clients send messages, each again until it is told 250, while the
         proxy is killed with SIGKILL at random moments and started anew.
         No message that a client was told 250 for may be missing at the next
         server. One may be there twice: between the next server's 250 and
         ours the proxy may die, and no relay without a queue can close that.
memory   A message of 32 MiB through the proxy: what it takes, at most, above
         what an idle proxy takes (Linux).
"""

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

HOST = '127.0.0.1'
SECONDS = 10
CLIENTS = 8
SIZE = 32 << 20


class Sink(threading.Thread):
    """The next server: takes everything, and keeps the ids of the messages."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listener = socket.create_server((HOST, 0), backlog=200)
        self.port = self.listener.getsockname()[1]
        self.lock = threading.Lock()
        self.ids = []

    def run(self):
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        try:
            with connection, connection.makefile('rb') as lines:
                connection.sendall(b'220 sink\r\n')
                for line in lines:
                    verb = line[:4].upper()
                    if verb == b'DATA':
                        connection.sendall(b'354 go ahead\r\n')
                        ids = self.message(lines)
                        if ids is None:
                            return   # not the end of a message
                        with self.lock:
                            self.ids += ids
                    connection.sendall(b'221 bye\r\n' if verb == b'QUIT' else b'250 ok\r\n')
                    if verb == b'QUIT':
                        return
        except OSError:
            pass

    @staticmethod
    def message(lines):
        ids = []
        for line in lines:
            if line == b'.\r\n':
                return ids
            if line.startswith(b'X-Id: '):
                ids.append(line[6:].strip().decode())
        return None


def free_port():
    with socket.socket() as it:
        it.bind((HOST, 0))
        return it.getsockname()[1]


class Proxy:
    """The program in front of the sink, always on the same port."""

    def __init__(self, program, sink, *options):
        self.port = free_port()
        self.command = [program, '-n', *options, '%s:%d' % (HOST, self.port), '%s:%d' % (HOST, sink.port)]
        self.process = None

    def start(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                with socket.create_connection((HOST, self.port)) as it:
                    if it.recv(4) == b'220 ':
                        return
            except OSError:
                time.sleep(0.002)
        raise RuntimeError('the proxy does not listen')

    def kill(self):
        self.process.kill()
        self.process.wait()


def send(port, name, body=b'hello\r\n', recipients=(b'b@example',)):
    """Sends a message; the answer to it, or to what was refused before."""
    with socket.create_connection((HOST, port), timeout=60) as it, it.makefile('rb') as replies:
        def reply():
            while True:
                line = replies.readline()
                if not line.endswith(b'\n'):
                    raise OSError('the proxy is gone')
                if line[3:4] != b'-':
                    return line.decode().strip()
        reply()
        commands = [b'EHLO client.test', b'MAIL FROM:<a@client.test>']
        for command in commands + [b'RCPT TO:<%s>' % to for to in recipients] + [b'DATA']:
            it.sendall(command + b'\r\n')
            told = reply()
            if told[0] not in '23':
                return told
        it.sendall(b'X-Id: %s\r\n\r\n' % name.encode() + body + b'.\r\n')
        return reply()


def kill(program):
    sink = Sink()
    sink.start()
    proxy = Proxy(program, sink)
    proxy.start()
    told = [[] for _ in range(CLIENTS)]
    stop = time.monotonic() + SECONDS
    problems = []

    def client(number):
        count = 0
        while time.monotonic() < stop:
            name = '%d.%d' % (number, count)
            count += 1
            while True:
                try:
                    answer = send(proxy.port, name)
                except OSError:
                    answer = ''
                if answer.startswith('250'):
                    told[number].append(name)
                    break
                if answer.startswith('5'):
                    problems.append(answer)
                    return
                if time.monotonic() > stop + 10:
                    problems.append('%s is never taken: %s' % (name, answer))
                    return
                time.sleep(0.002)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    chance = random.Random(20240601)
    kills = 0
    while time.monotonic() < stop:
        time.sleep(chance.uniform(0.005, 0.3))
        proxy.kill()
        kills += 1
        proxy.start()
    for thread in threads:
        thread.join()
    proxy.kill()
    names = [name for each in told for name in each]
    there = sink.ids
    lost = set(names) - set(there)
    print('kill: %d kills, %d messages were told 250, %d lost, %d copies too many'
          % (kills, len(names), len(lost), len(there) - len(set(there))))
    if not names or not kills:
        problems.append('nothing happened')
    return problems + ['%s is lost' % name for name in sorted(lost)]


def resident(pid, field):
    with open('/proc/%d/status' % pid) as status:
        return int(re.search(field + r':\s+(\d+) kB', status.read()).group(1)) * 1024


def memory(program):
    problems = []
    sink = Sink()
    sink.start()
    lists = tempfile.mkdtemp(prefix='smtpd-kill-')
    names = [b'one@example.com', b'two@example.com', b'three@example.com']
    for name in names:
        os.makedirs(os.path.join(lists, name.decode().replace('@', '.')))
    mailman = ['-c', 'MailmanProxy', '--mailman-lists', lists, '--mailman-lmtp', '%s:%d' % (HOST, sink.port)]
    body = (b'x' * 70 + b'\r\n') * (SIZE // 72 - 100)
    try:
        for what, options, recipients, limit in (
                ('PureProxy', ['-c', 'PureProxy'], [b'b@example'], 1.3),
                ('MailmanProxy, 1 list', mailman, names[:1], 2.2),
                ('MailmanProxy, upstream and 3 lists', mailman, [b'b@example'] + names, 2.2)):
            proxy = Proxy(program, sink, *options)
            proxy.start()
            try:
                base = resident(proxy.process.pid, 'VmRSS')
                answer = send(proxy.port, what, body, recipients)
                factor = (resident(proxy.process.pid, 'VmHWM') - base) / len(body)
            finally:
                proxy.kill()
            print('memory: %s: %.2f of the message' % (what, factor))
            if not answer.startswith('250') or factor > limit:
                problems.append('%s: %s, %.2f, not %.1f' % (what, answer, factor, limit))
    finally:
        for name in names:
            os.rmdir(os.path.join(lists, name.decode().replace('@', '.')))
        os.rmdir(lists)
    return problems


def main():
    program = os.path.abspath(sys.argv[1])
    problems = kill(program)
    if os.path.exists('/proc/self/status'):
        problems += memory(program)
    for problem in problems:
        print('FAILED', problem)
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())

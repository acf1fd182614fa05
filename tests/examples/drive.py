#!/usr/bin/env python3
"""Runs one example with real clients, and checks what it does.

    drive.py NAME PROGRAM [PORT]    one line, and 0 when it does what it should
    drive.py free_port              prints a port that is free

PORT is for examples that have theirs built in.
"""

import base64
import contextlib
import email.message
import http.server
import json
import os
import pathlib
import random
import re
import select
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

HOST = '127.0.0.1'
PATIENCE = 10   # seconds, for what should happen at once
MESSAGE = 'Subject: Test\n\nHello\n.\nworld\n'


def free_port():
    """None of those that the system gives to whoever asks for any: it must stay free for a moment."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind((HOST, port := random.randint(10000, 30000)))
            return port


def same(actual, expected):
    assert actual == expected, '%r, not %r' % (actual, expected)


class Program:
    """A running example; when it is `announced`, it says first `listening on HOST:PORT`."""

    def __init__(self, *args, announced=True, port=0):
        self.process = subprocess.Popen([str(arg) for arg in args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        start_new_session=True)
        self.output = b''
        self.port = port
        try:
            if announced:
                told = self.read_until(b'\n')
                assert told.startswith(b'listening on 127.0.0.1:'), told
                self.port = int(told.split(b':')[1])
                self.output = b''
        except BaseException:
            self.__exit__()   # `with` calls it only for what has been made
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)   # what strace runs outlives it otherwise
        self.process.wait()
        self.process.stdout.close()

    def read_until(self, text):
        """What it has printed up to now, which has `text` in it."""
        end = time.monotonic() + PATIENCE
        while text not in self.output:
            ready = select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))[0]
            piece = os.read(self.process.stdout.fileno(), 65536) if ready else b''
            assert piece, '%r does not come after %r' % (text, self.output)
            self.output += piece
        return self.output

    def connect(self):
        """A connection, as soon as it listens."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return socket.create_connection((HOST, self.port), PATIENCE)
            except ConnectionRefusedError:
                if time.monotonic() > end or self.process.poll() is not None:
                    raise
                time.sleep(0.005)

    def smtp(self, kind=smtplib.SMTP):
        self.connect().close()
        return kind(HOST, self.port, local_hostname='client', timeout=PATIENCE)

    def send(self, message=MESSAGE, to='you@example.com'):
        with self.smtp() as client:
            client.sendmail('me@example.com', to, message)


class Conversation:
    """Lines over a socket."""

    def __init__(self, program):
        self.sock = program.connect()
        self.file = self.sock.makefile('rb')

    def say(self, line, replies=1):
        self.sock.sendall(line.encode() + b'\r\n')
        return self.hear(replies)

    def hear(self, lines=1):
        return b''.join(self.file.readline() for _ in range(lines)).decode()

    def close(self):
        self.file.close()
        self.sock.close()


def run(*args):
    return subprocess.run([str(arg) for arg in args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)


def custom_server(path, port):
    with Program(path, announced=False, port=port) as program:
        program.send(to=['you@example.com', 'they@example.com'])
        told = program.read_until(b'Message length')
        assert told.startswith(b"Receiving message from: ('127.0.0.1', "), told
        assert b'Message addressed from: me@example.com\nMessage addressed to  : 2 recipients\n' in told, told
    return 'it told of a message'


def debugging_server(path, port):
    with Program(path, announced=False, port=port) as program:
        program.send()
        same(program.read_until(b'END MESSAGE ------------\n'),
             b"---------- MESSAGE FOLLOWS ----------\nmail options: ['SIZE=34']\n"
             b'Subject: Test\nX-Peer: 127.0.0.1\n\nHello\n.\nworld\n'
             b'------------ END MESSAGE ------------\n')
    return 'it printed a message'


def my_smtpd(path):
    where = '%s:%d' % (HOST, port := free_port())
    with Program(path, '-n', '-c', 'Counter', where, announced=False, port=port) as program:
        for _ in range(3):
            program.send()
        same(program.read_until(b'3 messages\n'), b'1 messages\n2 messages\n3 messages\n')
        program.process.send_signal(signal.SIGTERM)
        same(program.process.wait(PATIENCE), 0)
    assert b'Counter' in run(path, '-h').stdout
    return 'it counted three messages behind the whole command line'


class Receiver:
    """A server of one connection, in a thread: says each of `replies` when a line has come, keeps all lines."""

    def __init__(self, port, greeting, reply):
        self.listener = socket.create_server((HOST, port))
        self.port = self.listener.getsockname()[1]
        self.lines = []
        self.greeting = greeting
        self.reply = reply
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        with contextlib.closing(self.listener.accept()[0]) as sock, sock.makefile('rb') as file:
            sock.settimeout(PATIENCE)
            sock.sendall(self.greeting)
            for line in file:
                self.lines.append(line)
                sock.sendall(self.reply(line))
        self.listener.close()


def receiver_of_mail(port=0, lmtp=False):
    """A mail server that takes everything; LMTP has a reply for each recipient."""
    in_data, recipients = [], []

    def reply(line):
        if in_data and line != b'.\r\n':
            return b''
        if line.startswith(b'RCPT'):
            recipients.append(line)
        if in_data and lmtp:
            in_data.clear()
            return b'250 ok\r\n' * len(recipients)
        in_data[:] = [True] if line == b'DATA\r\n' else []
        return {b'DATA': b'354 go on\r\n', b'QUIT': b'221 bye\r\n'}.get(line.strip(), b'250 ok\r\n')

    return Receiver(port, b'220 test\r\n', reply)


def senddata(path, port):
    receiver = receiver_of_mail(port)
    result = run(path)
    same((result.returncode, result.stdout), (0, b''))
    receiver.thread.join(PATIENCE)
    text = b''.join(receiver.lines)
    assert b'MAIL FROM:<author@example.com>' in text and b'RCPT TO:<recipient@example.com>\r\n' in text, text
    assert b'\r\n\r\nThis is the body of the message.\r\n.\r\n' in text, text
    same(run(path).returncode, 1)   # nobody listens
    return 'it sent a message, and told when it could not'


def proxy(path):
    receiver = receiver_of_mail()
    with Program(path, port := free_port(), HOST, receiver.port, announced=False, port=port) as program:
        program.send()
        receiver.thread.join(PATIENCE)
        try:
            program.send()
            raise AssertionError('acknowledged without a next server')
        except smtplib.SMTPResponseException as error:
            same(error.smtp_code, 451)
    text = b''.join(receiver.lines)
    assert b'RCPT TO:<you@example.com>\r\n' in text, text
    assert b'\r\nX-Peer: 127.0.0.1\r\n\r\nHello\r\n..\r\nworld\r\n.\r\n' in text, text
    return 'it passed a message on, and did not take the next one when it could not'


def fault_server(path):
    with Program(path, 0) as program, program.smtp() as client:
        client.ehlo()
        same(client.mail('me@example.com')[0], 250)
        same([client.rcpt('you@example.com')[0] for _ in range(4)], [451, 451, 250, 250])
        same(client.data(MESSAGE)[0], 250)
        client.docmd('FOO')
        told = program.read_until(b'# client error: no command that we know: FOO')
        assert b'\n2 S: 451 4.3.0 try again\n2 C: rcpt TO:' in told, told
    with Program(path, 0, '.=1=452 full', 'MAIL=0=550 never', 'RSET=1=drop') as program, program.smtp() as client:
        client.ehlo()
        same([client.mail('me@example.com')[0] for _ in range(3)], [550] * 3)
        try:
            client.rset()
            raise AssertionError('it is still there')
        except smtplib.SMTPServerDisconnected:
            pass
    with Program(path, 0, '.=1=452 full') as program:
        try:
            program.send()
            raise AssertionError('it took the first message')
        except smtplib.SMTPDataError as error:
            same(error.smtp_code, 452)
        program.send()
        for _ in range(3):   # memory is given back, and it goes on
            program.send()
    with Program(path, 0, 'none') as program, program.smtp() as client:
        client.user, client.password = 'user', 'secret'
        client.ehlo()
        for mechanism in ('CRAM-MD5', 'PLAIN', 'LOGIN'):
            same(client.auth(mechanism, getattr(client, 'auth_' + mechanism.lower().replace('-', '_')))[0], 235)
            client.quit()
            client.connect(HOST, program.port)
            client.ehlo()
    if shutil.which('curl'):
        curl_meets_faults(path)
    for wrong in ('RCPT', 'RCPT=nothing', 'greeting=delay:2'):
        result = run(path, 0, wrong)
        same((result.returncode, result.stdout.count(b'\n')), (1, 1))
    return 'two recipients were put off, then all was well; other faults as told'


def curl_meets_faults(path):
    """libcurl, which many programs send mail with: what it makes of a fault, and that it does nothing wrong."""
    def curl(program, *more):
        return subprocess.run(['curl', '-s', '-S', '-m', '2', '--mail-from', 'me@example.com', '--mail-rcpt', 'you@example.com',
                               '-T', '-', 'smtp://%s:%d/client' % (HOST, program.port), *more],
                              input=MESSAGE.replace('\n', '\r\n').encode(), stderr=subprocess.PIPE, timeout=60).returncode

    for fault, expected in (('none', 0), ('greeting=delay:100ms', 0), ('MAIL=slow', 0), ('EHLO=lines:200', 0),
                            ('greeting=drop', 56), ('RCPT=550', 55), ('greeting=silence', 28), ('EHLO=502', 0)):
        with Program(path, 0, fault) as program:
            same((fault, curl(program)), (fault, expected))
            if not expected:
                told = program.read_until(b'S: 221 Bye')
                assert b'client error' not in told, told
    with Program(path, 0, 'none') as program:
        same(curl(program, '--user', 'user:secret', '--login-options', 'AUTH=CRAM-MD5'), 0)
        assert b' S: 235 ' in program.read_until(b'S: 221 Bye')


def fixture_test(path):
    result = run(path)
    same((result.returncode, result.stdout), (0, b'27 tests passed\n'))
    return 'its tests passed'


def with_framework(path):
    result = run(path)
    assert result.returncode == 0, result.stdout.decode()
    return 'a message came, and one was refused'


fixture_gtest = fixture_catch2 = fixture_doctest = with_framework


def tsan(path):
    return 'fixture: ' + fixture_test(path) + ' with ThreadSanitizer'


def auth(path):
    b64 = lambda text: base64.b64encode(text).decode()
    with Program(path, 0, 'user:secret') as program:
        for mechanism in 'PLAIN', 'LOGIN':
            with program.smtp() as client:
                client.ehlo()
                same(client.esmtp_features['auth'].split(), ['PLAIN', 'LOGIN'])
                same(client.mail('me@example.com')[0], 530)
                client.user, client.password = 'user', 'wrong'
                method = getattr(client, 'auth_' + mechanism.lower())
                try:
                    client.auth(mechanism, method)
                    raise AssertionError('a wrong password does')
                except smtplib.SMTPAuthenticationError as error:
                    same(error.smtp_code, 535)
                same(client.mail('me@example.com')[0], 530)
                client.password = 'secret'
                same(client.auth(mechanism, method, initial_response_ok=mechanism == 'LOGIN')[0], 235)
                client.sendmail('me@example.com', 'you@example.com', MESSAGE)
        talk = Conversation(program)
        talk.hear()
        for line, replies, expected in (
                ('AUTH PLAIN', 1, '503 '), ('EHLO x', 5, '250-'), ('AUTH', 1, '504 '), ('AUTH CRAM-MD5', 1, '504 '),
                ('AUTH PLAIN', 1, '334 \r\n'), ('*', 1, '501 '), ('AUTH PLAIN =', 1, '501 '),
                ('AUTH PLAIN QQ=', 1, '501 '), ('AUTH PLAIN ====', 1, '501 '), ('AUTH PLAIN Q?==', 1, '501 '),
                ('AUTH PLAIN ' + b64(b'user\0secret'), 1, '501 '), ('AUTH LOGIN', 1, '334 VXNlcm5hbWU6\r\n'),
                (b64(b'user'), 1, '334 UGFzc3dvcmQ6\r\n'), ('MAIL FROM:<a@b>', 1, '501 '), ('NOOP', 1, '250 OK'),
                ('AUTH LOGIN ' + b64(b'user'), 1, '334 '), ('x' * 5000, 1, '535 '),
                ('AUTH PLAIN ' + b64(b'\0user\0secret'), 1, '235 '), ('AUTH PLAIN', 1, '503 '),
                ('MAIL FROM:<a@b>', 1, '250 OK')):
            reply = talk.say(line, replies)
            assert reply.startswith(expected), '%r gets %r' % (line, reply)
        talk.close()
    with Program(path, 0) as program, program.smtp() as client:
        client.login('anybody', 'anything')
        client.sendmail('me@example.com', 'you@example.com', MESSAGE)
    return 'PLAIN and LOGIN, right and wrong, and everybody let in'


def own_channel(path):
    with Program(path, 0) as program:
        with program.smtp() as client:
            client.ehlo()
            assert client.has_extn('xcount')
            same(client.docmd('XCOUNT'), (250, b'so far\n0 messages'))
            same(client.docmd('XCOUNT', 'x')[0], 501)
            same(client.docmd('HELP', 'XCOUNT'), (250, b'Syntax: XCOUNT'))
            refused = client.sendmail('a@example.com', ['alice@example.com', 'eve@example.com'], 'Subject: Hi\n\nHi')
            same(refused, {'eve@example.com': (550, b'no such user')})
            try:
                client.sendmail('a@example.com', ['bob@example.com'], 'Subject: You won the lottery')
                assert False, 'it was taken'
            except smtplib.SMTPDataError as error:
                same(error.smtp_code, 554)
            same(client.docmd('XCOUNT'), (250, b'so far\n1 messages'))
    return 'a verb that EHLO tells of; a recipient and a message that are refused'


def maildir(path):
    with tempfile.TemporaryDirectory() as folder:
        box = pathlib.Path(folder, 'Maildir')
        acknowledged, begun, kills = set(), 0, 25
        for kill in range(kills):
            with Program(path, box, 0) as program:
                def send(first, count=10000):
                    try:
                        with smtplib.SMTP(HOST, program.port, 'client', PATIENCE) as client:
                            for n in range(first, first + count):
                                client.sendmail('me@example.com', 'you@example.com', message(n))
                                acknowledged.add(n)
                    except (smtplib.SMTPException, OSError):
                        pass   # killed

                senders = [threading.Thread(target=send, args=((begun + i) * 10000,)) for i in range(4)]
                begun += len(senders)
                for sender in senders:
                    sender.start()
                time.sleep(random.uniform(0.005, 0.2))
                program.process.send_signal(signal.SIGKILL)
                for sender in senders:
                    sender.join()
        stored = {}
        for file in (box / 'new').iterdir():
            text = file.read_text()
            n = int(text.split('Subject: ')[1].split('\n')[0])
            same(text, 'Return-Path: <me@example.com>\nDelivered-To: you@example.com\n' + message(n))
            assert n not in stored, '%d twice' % n
            stored[n] = file
        assert acknowledged, 'nothing was acknowledged'
        assert acknowledged <= set(stored), 'lost: %s' % (acknowledged - set(stored))
        # What can't be stored is not acknowledged, and leaves nothing behind.
        with Program(path, box, 0) as program:
            left = set((box / 'tmp').iterdir())
            (box / 'new').rename(box / 'old')
            try:
                program.send()
                raise AssertionError('acknowledged without a folder')
            except smtplib.SMTPDataError as error:
                same(error.smtp_code, 451)
            same(set((box / 'tmp').iterdir()), left)
            (box / 'old').rename(box / 'new')
            program.send()
            same(len(list((box / 'new').iterdir())), len(stored) + 1)
        synced = check_order(path, box) if shutil.which('strace') else 'order not looked at, there is no strace'
    return 'killed %d times, %d messages acknowledged, none of them lost; %s' % (kills, len(acknowledged), synced)


def check_order(path, box):
    """The file is synced before it gets its name, and the folder before the acknowledgement."""
    trace = pathlib.Path(box, 'trace')
    calls = 'openat,open,fsync,link,linkat,sendto'
    try:
        with Program('strace', '-e', 'trace=' + calls, '-o', trace, path, box, 0) as program:
            trace.write_text('')
            program.send()
            program.process.send_signal(signal.SIGTERM)
    except (AssertionError, OSError):
        return 'order not looked at, strace is not allowed'
    steps = ''
    for line in trace.read_text().splitlines():
        for call, letter in ((r'open.*/tmp/.*O_CREAT', 'o'), (r'link', 'l'), (r'open.*/new", ', 'd'), (r'fsync\(', 's'),
                             (r'sendto\(.*"354 ', '['), (r'sendto\(.*"250 OK', ']')):
            if re.match(call, line):
                steps += letter
    same(steps[steps.index('['):][:7], '[oslds]')
    return 'synced before that'


def message(n):
    return 'Subject: %d\n\n%s\nend of %d\n' % (n, 'x' * (n % 5000), n)


def lmtp_server(path):
    with Program(path, 0) as program:
        talk = Conversation(program)
        talk.hear()
        same(talk.say('EHLO x'), '500 Error: command "EHLO" not recognized\r\n')
        same(talk.say('HELO x'), '500 Error: command "HELO" not recognized\r\n')
        same(talk.say('LHLO'), '501 Syntax: LHLO hostname\r\n')
        same(talk.say('LHLO x', 4).split('\r\n')[1:], ['250-SIZE 33554432', '250-8BITMIME', '250 HELP', ''])
        for recipients, text, expected in (
                (['a@b', 'nobody@b', 'c@d'], 'hello', '250 OK\r\n550 no such user\r\n250 OK\r\n'),
                (['nobody@b'], 'hello', '550 no such user\r\n'),
                (['a@b', 'c@d'], 'x' * 34000000, '552 Error: Too much mail data\r\n' * 2)):
            same(talk.say('MAIL FROM:<me@example.com>'), '250 OK\r\n')
            for recipient in recipients:
                same(talk.say('RCPT TO:<%s>' % recipient), '250 OK\r\n')
            assert talk.say('DATA').startswith('354 ')
            same(talk.say(text + '\r\n.', len(recipients)), expected)
        same(talk.say('NOOP'), '250 OK\r\n')
        talk.close()
        same(program.read_until(b'c@d\n'), b'5 bytes for a@b\n5 bytes for c@d\n')
        with program.smtp(smtplib.LMTP) as client:
            client.sendmail('me@example.com', 'you@example.com', MESSAGE)
        program.read_until(b'for you@example.com\n')
    return 'an answer for each recipient'


def echo_server(path):
    with Program(path, 0) as program:
        data = os.urandom(1000000)
        for _ in range(2):
            sock, received = program.connect(), b''
            sender = threading.Thread(target=sock.sendall, args=(data,))
            sender.start()
            while len(received) < len(data):
                received += sock.recv(65536)
            sender.join()
            assert received == data
            sock.close()
        program.read_until(b'Incoming connection from (')
    return 'a million bytes came back, twice'


def http_client(path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'You asked for %s\n' % self.path.encode())

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer((HOST, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    result = run(path, 'localhost', '/page', server.server_port)
    server.shutdown()
    server.server_close()
    same(result.returncode, 0)
    assert result.stdout.startswith(b'HTTP/1.0 200 OK\r\n'), result.stdout
    assert result.stdout.endswith(b'\r\n\r\nYou asked for /page\n'), result.stdout
    refused = run(path, HOST, '/page', server.server_port)
    same(refused.returncode, 1)
    assert refused.stdout.count(b'\n') == 1, refused.stdout
    return 'it fetched a page, and told when nobody answered'


def chat_room(path):
    with Program(path, 0) as program:
        ann, bob = Conversation(program), Conversation(program)
        names = ['%s:%d' % talk.sock.getsockname() for talk in (ann, bob)]
        same(ann.hear(2), '%s is here\r\n%s is here\r\n' % tuple(names))
        same(bob.hear(), '%s is here\r\n' % names[1])
        same(ann.hear(0), '')
        ann.sock.sendall(b'good \x1b[2Jmor')
        ann.sock.sendall('ning, B\u00f6b\r\nsecond\n'.encode())
        same(bob.hear(2), '%s: good [2Jmorning, B\u00f6b\r\n%s: second\r\n' % (names[0], names[0]))
        ann.close()
        same(bob.hear(), names[0] + ' has left\r\n')
        eve = Conversation(program)
        same(eve.hear()[-9:], 'is here\r\n')
        bob.hear()
        eve.sock.sendall(b'x' * 2000)
        same(eve.hear(), '')   # thrown out
        assert bob.hear().endswith(' has left\r\n')
        bob.close()
    return 'two talked, one left, one was thrown out'


def deferred(path):
    delay = 0.4
    with Program(path, 0, int(delay * 1000)) as program:
        times = []

        def send():
            with program.smtp() as client:
                client.helo()
                client.mail('me@example.com')
                client.rcpt('you@example.com')
                start = time.monotonic()
                same(client.data(MESSAGE), (250, b'OK, at last'))
                times.append(time.monotonic() - start)

        talk = Conversation(program)
        talk.hear()
        senders = [threading.Thread(target=send) for _ in range(5)]
        for sender in senders:
            sender.start()
        program.read_until(b'5 wait\n')
        same(talk.say('NOOP'), '250 OK\r\n')
        same(times, [])   # so nobody waits for them
        talk.close()
        for sender in senders:
            sender.join()
        same(len(times), 5)
        assert min(times) >= delay - 0.01 and max(times) < delay + 5, times
    return 'five answers came later, while another client was served'


@contextlib.contextmanager
def haproxy(program, how, host=HOST):
    """HAProxy in front of a program: gives its port."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / 'haproxy.cfg'
        file.write_text('defaults\n mode tcp\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n'
                        'listen mail\n bind %s:%d\n server one %s:%d %s\n' % (host, port, HOST, program.port, how))
        with Program(shutil.which('haproxy', path=os.environ['PATH'] + ':/usr/sbin'), '-db', '-f', file, announced=False,
                     port=port) as proxy:
            if host == HOST:
                proxy.connect().close()
            yield port


def proxy_protocol(path):
    peers = []

    def send(port, source):
        with smtplib.SMTP(HOST, port, 'client', PATIENCE, (source, 0)) as client:
            client.sendmail('me@example.com', 'you@example.com', MESSAGE)
        peers.append(source)

    def raw(program, *pieces):
        with contextlib.closing(program.connect()) as sock, sock.makefile('rb') as file:
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(0.02 if len(pieces) > 1 else 0)
            with contextlib.suppress(ConnectionResetError):
                return file.readline()

    message = b'HELO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n\r\nhi\r\n.\r\nQUIT\r\n'
    longest = b'PROXY UNKNOWN ' + b'x' * 91
    with Program(path, 0) as program:
        if shutil.which('haproxy', path=os.environ['PATH'] + ':/usr/sbin'):
            with haproxy(program, 'send-proxy') as port:
                for source in '127.0.0.2', '127.0.0.3':
                    send(port, source)
            with haproxy(program, 'send-proxy check inter 100') as port:   # its checks connect and go
                send(port, '127.0.0.4')
        elif os.environ.get('NO_SKIP') == '1':
            raise AssertionError('there is no haproxy')
        for line, host in (
                (b'PROXY TCP4 192.0.2.7 192.0.2.1 4321 25', '192.0.2.7'), (b'PROXY TCP6 2001:DB8::7 ::1 0 65535', '2001:db8::7'),
                (b'PROXY UNKNOWN', HOST), (b'PROXY UNKNOWN ffff::1 what ever', HOST), (longest, HOST)):
            for pieces in ([line + b'\r\n' + message], [line[:9], line[9:] + b'\r', b'\n' + message]):
                got = raw(program, *pieces)
                assert got.startswith(b'220 '), (line, got)
                peers.append(host)
        for line in (
                b'', b'HELO x', b'proxy UNKNOWN', b'PROXY', b'PROXY ', b'PROXY TCP4', b'PROXY  TCP4 192.0.2.7 192.0.2.1 4321 25',
                b'PROXY TCP4 192.0.2.7 192.0.2.1 4321', b'PROXY TCP4 192.0.2.7 192.0.2.1 4321 25 ', b'PROXY TCP4 ::1 ::1 1 2',
                b'PROXY TCP6 192.0.2.7 192.0.2.1 1 2', b'PROXY TCP4 localhost 192.0.2.1 1 2', b'PROXY TCP4 192.0.2.7 x 1 2',
                b'PROXY TCP4 192.0.2.7 192.0.2.1 65536 2', b'PROXY TCP4 192.0.2.7 192.0.2.1 1 02',
                b'PROXY TCP4 192.0.2.7 192.0.2.1 -1 2', b'PROXY TCP4 192.0.2.7 192.0.2.1 1 ', b'PROXY UDP4 1.2.3.4 1.2.3.4 1 2',
                b'PROXY TCP4 192.0.2.7\0 192.0.2.1 1 2', b'\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c', longest + b'x'):
            same(raw(program, line + b'\r\n' + message) or b'', b'')
        same(raw(program, b'x' * 106) or b'', b'')   # no line end, and none is waited for
        with contextlib.closing(program.connect()) as sock:
            same(select.select([sock], [], [], 0.2)[0], [])   # the banner waits
            sock.sendall(b'PROXY UNKNOWN\r\n')
            assert sock.recv(1000).startswith(b'220 ')
        raw(program, b'PROXY TCP4 192.0.2.99 192.0.2.1 1 2\r\n' + message)
        told = program.read_until(b'X-Peer: 192.0.2.99\n').decode()
        same(re.findall('X-Peer: (.*)', told), peers + ['192.0.2.99'])
    with Program(path, 0, '192.0.2.1', '192.0.2.2') as program:
        same(raw(program, b'PROXY TCP4 192.0.2.7 192.0.2.1 1 2\r\n' + message) or b'', b'')
    return 'it told of the clients behind HAProxy, and of no other that was made up'


def chunking(path):
    hello = b'EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n'

    def talk(program, *pieces):
        """The replies after those to EHLO, MAIL and RCPT."""
        with contextlib.closing(program.connect()) as sock, sock.makefile('rb') as file:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in (hello, *pieces):
                sock.sendall(piece)
                time.sleep(0.005 if len(pieces) > 1 else 0)
            sock.shutdown(socket.SHUT_WR)
            text = file.read().decode()
        assert '250-CHUNKING\r\n250 HELP\r\n250 OK\r\n250 OK\r\n' in text, text
        return text.split('250 HELP\r\n250 OK\r\n250 OK\r\n')[1].replace('\r\n', '|')

    def printed(program, data):
        same(program.read_until(b'\n'), b'%d bytes: %s\n' % (len(data), repr(data[:1000]).encode()))
        program.output = b''

    binary = b'\n\0\r.\r\n\r\n.\r\n\x1b\xff'
    limit = 33554432
    with Program(path, 0) as program:
        whole = b'BDAT 7\r\n' + binary[:7] + b'BDAT %d last\r\n' % (len(binary) - 7) + binary[7:] + b'QUIT\r\n'
        for pieces in [whole], [whole[i:i + 1] for i in range(len(whole))], [whole[:3], whole[3:9], whole[9:]]:
            same(talk(program, *pieces), '250 OK, 7 bytes|250 OK|221 Bye|')
            printed(program, binary)
        for text, expected, data in (
                (b'BDAT 0 LAST\r\nQUIT\r\n', '250 OK|221 Bye|', b''),
                (b'BDAT 0\r\nBDAT 3\r\n\nhiBDAT 0 LAST\r\nQUIT\r\n', '250 OK, 0 bytes|250 OK, 3 bytes|250 OK|221 Bye|', b'\nhi'),
                (b'BDAT 2\r\nhiDATA\r\nRCPT TO:<e@f>\r\nBDAT 1 LAST\r\n!QUIT\r\n',
                 '250 OK, 2 bytes|503 Error: BDAT has begun|250 OK|250 OK|221 Bye|', b'hi!'),
                (b'BDAT 2\r\nnoRSET\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nBDAT 3 LAST\r\nyesQUIT\r\n',
                 '250 OK, 2 bytes|250 OK|250 OK|250 OK|250 OK|221 Bye|', b'yes'),
                (b'BDAT 2\r\nnoRSET\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n..yes\r\n.\r\nQUIT\r\n',
                 '250 OK, 2 bytes|250 OK|250 OK|250 OK|354 End data with <CR><LF>.<CR><LF>|250 OK|221 Bye|', b'.yes'),
                (b'BDAT 2\r\nnoRSET\r\nBDAT 6 LAST\r\nQUIT\r\nNOOP\r\nQUIT\r\n',
                 '250 OK, 2 bytes|250 OK|503 Error: need RCPT command|250 OK|221 Bye|', None),
                (b'BDAT 600\r\n' + b'x' * 600 + b'BDAT %d\r\n' % (limit - 599) + b'RSET\r\n'.ljust(limit - 599) +
                 b'BDAT 6 LAST\r\nQUIT\r\nNOOP\r\nQUIT\r\n',
                 '250 OK, 600 bytes|552 Error: Too much mail data|503 Error: need RCPT command|250 OK|221 Bye|', None),
                (b'BDAT 600\r\n' + b'x' * 600 + b'BDAT %d LAST\r\n' % (limit - 600) + b'x' * (limit - 600) +
                 b'BDAT 6 LAST\r\nQUIT\r\nQUIT\r\n',
                 '250 OK, 600 bytes|250 OK|503 Error: need RCPT command|221 Bye|', b'x' * limit),
                *((b'BDAT' + wrong + b'\r\nQUIT\r\n', '501 Syntax: BDAT size [LAST]|', None) for wrong in
                  (b'', b' ', b' LAST', b' -1', b' +1', b' 1x', b' 1LAST', b' 1 LAST x', b' 1 LAST\0', b' 1  LAST', b' 1 FIRST', b' 0x1',
                   b' 9999999999999999'))):
            same(talk(program, text), expected)
            if data is not None:
                printed(program, data)
        program.send()   # DATA is as it was
        printed(program, MESSAGE[:-1].encode())
    return 'messages in chunks, of any bytes, in any pieces; what is refused is read and forgotten'


def gate(path):
    store, next_hop = receiver_of_mail(lmtp=True), receiver_of_mail()
    with Program(path, 0, next_hop.port, store.port) as program:
        if shutil.which('swaks'):
            result = run('swaks', '--server', '%s:%d' % (HOST, program.port), '--from', 'me@example.com',
                         '--to', 'you@elsewhere.example')
            assert b'550 relaying denied' in result.stdout, result.stdout
        elif os.environ.get('NO_SKIP') == '1':
            raise AssertionError('there is no swaks')
        with program.smtp() as client:
            client.ehlo()
            for domain, receiver in ('Relayed.EXAMPLE', next_hop), ('stored.example', store):
                same(client.mail('me@example.com')[0], 250)
                for address, code in (
                        ('you@elsewhere.example', 550), ('you', 550), ('you@relayed.example.org', 550),
                        ('you@sub.relayed.example', 550), ('you%relayed.example', 550),
                        ('"you@stored.example"@elsewhere.example', 550), ('you@' + domain, 250),
                        ('they@' + domain, 250), ('you@elsewhere.example', 550),
                        ('you@' + ('relayed.example' if receiver is store else 'stored.example'), 452)):
                    same((address, client.rcpt(address)[0]), (address, code))
                same(client.data(MESSAGE)[0], 250)
        for receiver in next_hop, store:
            receiver.thread.join(PATIENCE)
        for receiver, hello, domain in (next_hop, b'EHLO ', b'Relayed.EXAMPLE'), (store, b'LHLO ', b'stored.example'):
            text = b''.join(receiver.lines)
            assert text.startswith(hello), text
            same(re.findall(rb'RCPT TO:<(.*)>', text), [b'you@' + domain, b'they@' + domain])
            assert text.endswith(b'\r\n\r\nHello\r\n..\r\nworld\r\n.\r\nQUIT\r\n'), text
        with program.smtp() as client:   # nobody is behind it any more
            client.ehlo()
            client.mail('me@example.com')
            same(client.rcpt('you@elsewhere.example')[0], 550)
            same(client.rcpt('you@relayed.example')[0], 451)
    where = free_port()
    same(run(path, where, where).returncode, 1)   # to itself
    return 'mail for one domain went on, for another one into the store; all else was refused'
def readable(path):
    part = email.message.EmailMessage()
    part['Subject'], part['From'] = 'Grüße\u009b31m – ☕', 'Ann <ann@example.com>'
    part.set_content('Käse = gut, \x1b[31mrot\x1b[0m\n' + 'x' * 100 + '\n')
    part.add_alternative('<b>Käse</b>', subtype='html')
    part.add_attachment(b'%PDF' * 1000, maintype='application', subtype='pdf', filename='Übersicht\x1b.pdf')
    part.add_attachment(b'abc', maintype='image', subtype='png')
    html = email.message.EmailMessage()
    html['Subject'] = 'only HTML'
    html.set_content('<p>Schön</p>', subtype='html', cte='base64')
    with Program(path, 0) as program:
        program.send(b'X-Bad: =?utf-8?q?a=0D=0AEvil=3A_1=1B=5B2J?=\n' + part.as_bytes())
        told = program.read_until(b'END MESSAGE ------------\n').decode()
        for text in ('\nSubject: Grüße\\xc2\\x9b31m – ☕\n', '\nFrom: Ann <ann@example.com>\n', 'X-Bad: a  Evil: 1\\x1b[2J\n',
                     'X-Peer: 127.0.0.1\n\nKäse = gut, \\x1b[31mrot\\x1b[0m\n' + 'x' * 100 + '\n', '\n[attachment text/html, 13 bytes]\n',
                     '\n[attachment Übersicht\\x1b.pdf, application/pdf, 4000 bytes]\n', '\n[attachment image/png, 3 bytes]\n'):
            assert text in told, '%r is not in %s' % (text, told)
        assert '\x1b' not in told and '\x9b' not in told and '=?' not in told, told
        program.output = b''
        program.send(html.as_bytes())
        told = program.read_until(b'END MESSAGE ------------\n').decode()
        assert '\n\n<p>Schön</p>\n------------ END' in told, told
        program.output = b''
        program.send(bytes(range(1, 256)).replace(b'\r', b'').replace(b'\n', b''))
        assert b'\x1b' not in program.read_until(b'END MESSAGE ------------\n')
    return 'it printed what people can read'


def inbox(path):
    """What a browser sees is inbox_test.py's."""
    with Program(path, 0, 0, announced=False) as program:
        told = program.read_until(b'/\n').decode()
        program.port, url = int(told.split(',')[0].split(':')[1]), 'http:' + told.split('http:')[1].strip()
        program.send()
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url + 'messages', timeout=PATIENCE) as answer:
            mails = json.load(answer)['messages']
        same([(it['subject'], it['preview']) for it in mails], [('Test', 'Hello\n.\nworld')])
    return 'it told of a message, in JSON'


def main():
    if sys.argv[1] == 'free_port':
        return print(free_port())
    name = sys.argv[1]
    drive = globals().get(name)
    assert drive, 'nothing here drives ' + name
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))   # which ends what it has started
    print('ok: %s: %s' % (name, drive(sys.argv[2], *map(int, sys.argv[3:]))), flush=True)


if __name__ == '__main__':
    main()

#!/usr/bin/env python3
"""Runs one of the examples with TLS with real clients and servers, and with bad ones.

    tls_test.py NAME PROGRAM    one line, and 0 when it does what it should

Clients that are not installed are told of; with NO_SKIP=1 in the environment they are an error.
"""

import base64
import contextlib
import os
import pathlib
import re
import shutil
import signal
import smtplib
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time

from drive import HOST, MESSAGE, PATIENCE, Program, Receiver, free_port, receiver_of_mail, run, same

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / 'interop'))

missing = []


def has(tool):
    path = shutil.which(tool, path=os.environ.get('PATH', os.defpath) + ':/usr/sbin')
    assert path or os.environ.get('NO_SKIP') != '1', '%s is not installed' % tool
    if not path:
        missing.append(tool)
    return path


class Certificates:
    """cert.pem and key.pem, for localhost and 127.0.0.1; other.pem and other-key.pem, for another name."""

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        for name, key, names in (('cert', 'key', 'DNS:localhost,IP:127.0.0.1'),
                                 ('other', 'other-key', 'DNS:other.test')):
            subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2',
                            '-subj', '/CN=' + name, '-addext', 'subjectAltName=' + names,
                            '-keyout', self.path(key), '-out', self.path(name)],
                           check=True, capture_output=True)
        self.cert, self.key = self.path('cert'), self.path('key')
        self.other, self.other_key = self.path('other'), self.path('other-key')
        return self

    def path(self, name):
        return os.path.join(self.folder.name, name + '.pem')

    def client(self):
        return ssl.create_default_context(cafile=self.cert)

    def __exit__(self, *exception):
        self.folder.cleanup()


class Both(Program):
    """A program that listens on two ports: STARTTLS and SMTPS."""

    def __init__(self, *args):
        super().__init__(*args, announced=False)
        try:
            told = self.read_until(b'\n')
            self.port, self.smtps = (int(port) for port in re.findall(rb'127\.0\.0\.1:(\d+)', told))
            self.output = b''
        except BaseException:
            self.__exit__()
            raise

    def cpu(self):
        """Seconds of processor time that it has used."""
        fields = pathlib.Path('/proc/%d/stat' % self.process.pid).read_text().rpartition(')')[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

    def memory(self):
        """KiB, at most; with AddressSanitizer, which gives nothing back for a while, 0."""
        if 'libasan' in pathlib.Path('/proc/%d/maps' % self.process.pid).read_text():
            return 0
        status = pathlib.Path('/proc/%d/status' % self.process.pid).read_text()
        return int(re.search(r'VmHWM:\s+(\d+)', status).group(1))

    def idles(self, seconds, what):
        """It must do so now: a loop that spins takes all of that time."""
        before = self.cpu()
        time.sleep(seconds)
        used = self.cpu() - before
        assert used < max(0.03, seconds / 25), '%s: %.2f s of processor time in %.2f s' % (what, used, seconds)
        return used

    def descriptors(self):
        return len(os.listdir('/proc/%d/fd' % self.process.pid))

    def raw(self, port=None):
        sock = socket.create_connection((HOST, port or self.port), PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def is_well(self, certificates):
        for smtps in False, True:
            with Talk(self, certificates, smtps) as talk:
                talk.says('NOOP', '250 OK\r\n')


class Talk:
    """A conversation: with TLS from the start, or after STARTTLS, or `plain` until start_tls()."""

    def __init__(self, program, certificates, smtps=False, plain=False, greeted=True):
        self.context = certificates.client()
        self.context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF   # an end that is not announced is an exception
        self.sock = program.raw(program.smtps if smtps else program.port)
        if smtps:
            self.sock = self.context.wrap_socket(self.sock, server_hostname='localhost', suppress_ragged_eofs=False)
        self.file = self.sock.makefile('rb')
        assert self.line().startswith('220 ')
        if not smtps and not plain:
            self.says('EHLO x', '250')
            self.start_tls()
        if greeted and not plain:
            self.says('EHLO x', '250')

    def start_tls(self, with_it=b''):
        self.sock.sendall(b'STARTTLS\r\n' + with_it)
        same(self.line(), '220 Ready to start TLS\r\n')
        self.file.close()
        self.sock = self.context.wrap_socket(self.sock, server_hostname='localhost', suppress_ragged_eofs=False)
        self.file = self.sock.makefile('rb')

    def line(self):
        return self.file.readline().decode()

    def hear(self):
        lines = self.line()
        while lines and lines.split('\n')[-2][3:4] == '-':
            lines += self.line()
        return lines

    def says(self, line, expected):
        self.sock.sendall(line.encode() + b'\r\n')
        heard = self.hear()
        assert heard.startswith(expected), '%r gets %r' % (line, heard)
        return heard

    def send(self, data):
        self.says('MAIL FROM:<me@example.com>', '250')
        self.says('RCPT TO:<you@example.com>', '250')
        self.says('DATA', '354')
        return self.says(data + '\r\n.', '250')

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()
        self.sock.close()


def clients(certificates, port, smtps):
    """(name, what it is run with, its input) of every client that there is."""
    text = 'Subject: Test\r\n\r\nHello from %s\r\n'
    if has('swaks'):
        for how, to in ('--tls', port), ('--tls-on-connect', smtps):
            name = 'swaks ' + how
            yield name, ['swaks', how, '--server', '%s:%d' % (HOST, to), '--to', 'you@example.com',
                         '--from', 'me@example.com', '--helo', 'x', '--data', text.replace('\r\n', '\n') % name], ''
    if has('curl'):
        for scheme, to in ('smtp', port), ('smtps', smtps):
            name = 'curl ' + scheme
            yield name, ['curl', '-sS', '--ssl-reqd', '--cacert', certificates.cert, '%s://localhost:%d' % (scheme, to),
                         '--mail-from', 'me@example.com', '--mail-rcpt', 'you@example.com', '-T', '-'], text % name
    for version in '-tls1_2', '-tls1_3':
        for how, to in (['-starttls', 'smtp'], port), ([], smtps):
            name = 'openssl ' + ' '.join([version] + how)
            yield name, ['openssl', 's_client', version] + how + [
                '-quiet', '-crlf', '-connect', '%s:%d' % (HOST, to), '-CAfile', certificates.cert,
                '-verify_return_error', '-verify_hostname', 'localhost'], (
                'EHLO x\nMAIL FROM:<me@example.com>\nRCPT TO:<you@example.com>\nDATA\n' + text % name + '.\nQUIT\n'
                ).replace('\r', '')


def send_by_all(program, certificates, smtps):
    names = []
    for name, command, text in clients(certificates, program.port, smtps):
        result = subprocess.run(command, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                timeout=60)
        same((name, result.returncode, result.stdout * (result.returncode != 0)), (name, 0, ''))
        names.append(name)
    for smtp in (smtplib.SMTP(HOST, program.port, 'x', PATIENCE),
                 smtplib.SMTP_SSL('localhost', smtps, 'x', timeout=PATIENCE, context=certificates.client())):
        with smtp as client:
            client._host = 'localhost'   # the name to check
            if not isinstance(client, smtplib.SMTP_SSL):
                client.starttls(context=certificates.client())
            name = type(client).__name__
            client.sendmail('me@example.com', 'you@example.com', 'Subject: Test\n\nHello from %s\n' % name)
            names.append(name)
    return names


def tls_server(path):
    with Certificates() as certificates:
        bad = run(path, certificates.cert, '/nowhere/key.pem', 0, 0)
        same(bad.returncode, 1)
        same(bad.stdout, b'tls_server: /nowhere/key.pem: No such file or directory\n')
        same(run(path, certificates.cert, certificates.other_key, 0, 0).returncode, 1)   # the key of another one
        with Both(path, certificates.cert, certificates.key, 0, 0) as program:
            names = send_by_all(program, certificates, program.smtps)
            for name in names:
                told = program.read_until(b'Hello from %s\n' % name.encode())
            same(told.count(b'MESSAGE FOLLOWS'), len(names))
            assert b'info:' not in told, told
            with Talk(program, certificates, plain=True) as talk:   # TLS is offered, no more
                assert '250-STARTTLS\r\n' in talk.says('EHLO x', '250-')
                talk.says('STARTTLS now', '501 Syntax: STARTTLS')
                talk.says('HELP STARTTLS', '250 Syntax: STARTTLS')
                talk.send('Subject: in the clear')
                talk.says('MAIL FROM:<me@example.com>', '250')
                talk.says('RCPT TO:<you@example.com>', '250')
                talk.start_tls()   # everything is forgotten
                talk.says('MAIL FROM:<me@example.com>', '503 Error: send HELO first')
                talk.says('DATA', '503 Error: send HELO first')
                assert 'STARTTLS' not in talk.says('EHLO y', '250-')
                talk.says('DATA', '503 Error: need RCPT command')
                talk.says('STARTTLS', '503 ')
                talk.send('Subject: encrypted')
                talk.says('QUIT', '221 Bye')
                same(talk.sock.recv(1), b'')   # the end is announced
            with Talk(program, certificates, smtps=True) as talk:
                talk.says('STARTTLS', '500 ')
            program.is_well(certificates)
        with Both(path, certificates.cert, certificates.key, 0, 0, 'user:secret') as program:
            with Talk(program, certificates, plain=True) as talk:
                assert 'AUTH' not in talk.says('EHLO x', '250-')
                talk.says('AUTH PLAIN AHVzZXIAc2VjcmV0', '538 ')
                talk.says('MAIL FROM:<me@example.com>', '530 Must issue a STARTTLS command first')
                talk.start_tls()
                assert '250-AUTH PLAIN LOGIN\r\n' in talk.says('EHLO x', '250-')
                talk.says('MAIL FROM:<me@example.com>', '530 Authentication required')
                talk.says('AUTH PLAIN AHVzZXIAc2VjcmV0', '235 ')
                talk.send('Subject: by the user')
            with Talk(program, certificates, smtps=True, greeted=False) as talk:
                assert '250-AUTH PLAIN LOGIN\r\n' in talk.says('EHLO x', '250-')
                before = program.memory()
                long = base64.b64encode(b'\0user\0' + b'x' * 9200).decode()
                talk.says('AUTH PLAIN ' + long[:12264], '535 ')   # 12,277 bytes
                talk.says('AUTH PLAIN', '334 ')
                talk.says(long[:12284], '535 ')                   # 12,286 with CR LF
                talk.says('AUTH PLAIN', '334 ')
                talk.says('x' * 20000000, '500 Error: line too long')
                talk.says('AUTH PLAIN ' + 'x' * 12288, '500 Error: line too long')
                talk.says('AUTH PLAIN AHVzZXIAc2VjcmV0', '235 ')
                talk.send('Subject: by the user again')
            assert program.memory() < before + 10000, (before, program.memory())
            if has('swaks'):
                for how, to in ('--tls', program.port), ('--tls-on-connect', program.smtps):
                    same(run('swaks', how, '--server', '%s:%d' % (HOST, to), '--to', 'you@example.com',
                             '--auth', 'LOGIN', '--auth-user', 'user', '--auth-password', 'secret').returncode, 0)
    return '%s; AUTH only where all is encrypted' % ', '.join(names)


def tls_send(path):
    def send(port, how, expected, host='localhost', trust=None):
        command = [path, host, str(port), how, 'me@example.com', 'you@example.com', trust or certificates.cert]
        result = subprocess.run(command,
                                input=MESSAGE.encode(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        said = result.stdout.decode()
        assert re.match(expected, said), '%r, not %r' % (said, expected)
        same(result.returncode, 0 if said.startswith('250') else 1)

    with Certificates() as certificates:
        for smtps in False, True:
            how = 'smtps' if smtps else 'starttls'
            with TLSServer(certificates.cert, certificates.key, smtps) as server:
                send(server.port, how, '250 ')
                send(server.port, how, '250 ', host=HOST)   # the certificate has that address
                assert server.messages[0].endswith(b'\r\n\r\nHello\r\n..\r\nworld\r\n'), server.messages
                send(server.port, how, 'certificate verify failed: self-signed certificate', trust=certificates.other)
            with TLSServer(certificates.other, certificates.other_key, smtps) as server:
                send(server.port, how, 'certificate verify failed: hostname mismatch', trust=certificates.other)
                send(server.port, how, 'certificate verify failed: IP address mismatch', HOST, certificates.other)
        receiver = receiver_of_mail()
        send(receiver.port, 'starttls', 'the server does not offer STARTTLS')
        assert b'MAIL' not in b''.join(receiver.lines), receiver.lines
        for said, expected in ((b'454 not now\r\n', 'the server does not start TLS: 454 not now'),
                               (b'220 go\r\n250 injected\r\n', 'there are more answers than commands'),
                               (b'220 go\r\n250-injec', 'there are more answers than commands'),
                               (None, 'the connection was closed')):
            receiver = offers_STARTTLS(said)
            send(receiver.port, 'starttls', expected)
            assert b'MAIL' not in b''.join(receiver.lines), receiver.lines
        receiver = Fake(0, b'220 in the clear\r\n', lambda line: b'')
        send(receiver.port, 'smtps', 'TLS: wrong version number')
        send(free_port(), 'smtps', '.*Connection refused')
    return 'certificates, names and addresses that fit, and those that do not; servers that do not speak TLS'


class Fake(Receiver):
    """Of this one the client may break off."""

    def serve(self):
        with contextlib.suppress(OSError):
            super().serve()


def tls_fixture(path):
    with Certificates() as certificates:
        result = run(path, certificates.cert, certificates.key, certificates.other)
        same((result.returncode, result.stdout), (0, b'6 tests passed\n'))
    return 'its tests passed'


def offers_STARTTLS(said):
    """A server that says this to STARTTLS, and nothing afterwards; None: goes away."""
    def reply(line):
        if line == b'STARTTLS\r\n':
            return said if said is not None else sys.exit()
        return b'250-x\r\n250 STARTTLS\r\n' if line[1:4] == b'HLO' else b''
    return Fake(0, b'220 test\r\n', reply)


class TLSServer:
    """A mail server by Python's ssl."""

    def __init__(self, cert, key, smtps):
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(cert, key)
        self.smtps = smtps
        self.messages = []
        self.listener = socket.create_server((HOST, 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        while True:
            try:
                sock = self.listener.accept()[0]
            except OSError:
                return
            sock.settimeout(PATIENCE)
            with contextlib.suppress(OSError):
                self.converse(self.context.wrap_socket(sock, server_side=True) if self.smtps else sock)
            sock.close()

    def converse(self, sock):
        sock.sendall(b'220 test\r\n')
        file = sock.makefile('rb')
        encrypted = self.smtps
        while line := file.readline():
            word = line.split()[0].upper()
            if word == b'STARTTLS' and not encrypted:
                sock.sendall(b'220 go\r\n')
                sock = self.context.wrap_socket(sock, server_side=True)
                file = sock.makefile('rb')
                encrypted = True
            elif word == b'DATA':
                sock.sendall(b'354 go on\r\n')
                text = b''
                while not text.endswith(b'\r\n.\r\n'):
                    text += file.readline()
                self.messages.append(text[:-3])
                sock.sendall(b'250 taken\r\n')
            elif word == b'EHLO':
                sock.sendall(b'250 HELP\r\n' if encrypted else b'250-HELP\r\n250 STARTTLS\r\n')
            else:
                assert encrypted, line
                sock.sendall(b'221 bye\r\n' if word == b'QUIT' else b'250 OK\r\n')

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.listener.close()


def refused_by(program):
    """How a message ends that the proxy can't pass on."""
    with smtplib.SMTP(HOST, program.port, 'x', PATIENCE) as client:
        try:
            client.sendmail('me@example.com', 'you@example.com', MESSAGE)
            raise AssertionError('acknowledged')
        except smtplib.SMTPSenderRefused as error:
            same(error.smtp_code, 451)


def tls_proxy(path):
    folder = pathlib.Path(path).parent
    told = []
    with Certificates() as certificates:
        ours = [certificates.cert, certificates.key]
        with Both(folder / 'tls_server', *ours, 0, 0) as server:
            for how, port in ('starttls', server.port), ('smtps', server.smtps):
                with Program(path, *ours, 0, 'localhost', port, how, certificates.cert) as program:
                    with smtplib.SMTP(HOST, program.port, 'x', PATIENCE) as client:
                        client._host = 'localhost'
                        client.starttls(context=certificates.client())
                        client.sendmail('me@example.com', 'you@example.com', 'Subject: 1\n\nencrypted, then ' + how)
                    program.send('Subject: 2\n\nclear, then ' + how)
                    server.read_until(b'X-Peer: 127.0.0.1\nX-Peer: 127.0.0.1\n\nencrypted, then ' + how.encode())
                    server.read_until(b'\n\nclear, then ' + how.encode())
                with Program(path, *ours, 0, 'localhost', port, how, certificates.other) as program:
                    refused_by(program)
                    same(program.read_until(b'\n'),
                         b'next server: certificate verify failed: self-signed certificate\n')
        with Both(folder / 'tls_server', certificates.other, certificates.other_key, 0, 0) as server:
            for how, port in ('starttls', server.port), ('smtps', server.smtps):
                with Program(path, *ours, 0, 'localhost', port, how, certificates.other) as program:
                    refused_by(program)
                    same(program.read_until(b'\n'), b'next server: certificate verify failed: hostname mismatch\n')
        receiver = receiver_of_mail()
        with Program(path, *ours, 0, HOST, receiver.port, 'starttls', certificates.cert) as program:
            refused_by(program)
            same(program.read_until(b'\n'), b'next server: the server does not offer STARTTLS\n')
            assert b'MAIL' not in b''.join(receiver.lines), receiver.lines
        if has('postfix') and os.geteuid() == 0:
            told += postfix(path, ours, certificates)
    return ', '.join(['both sides encrypted', 'one', 'a next server that is not what it says'] + told)


def postfix(path, ours, certificates):
    import upstreams

    class Postfix(upstreams.Postfix):
        """With TLS as a server; and as a client for what goes to `relay`, which it gives to that port of ours."""

        def __init__(self, relay, options):
            super().__init__()
            for name in ('cert.pem', 'key.pem'):
                text = pathlib.Path(certificates.path(name[:-4])).read_text()
                self.write(name, text, 0o600 if name[0] == 'k' else 0o644)
            main = pathlib.Path(self.path('etc/main.cf'))
            main.write_text(re.sub('relay_(domains|transport) =.*', '', main.read_text()) + '\n'.join((
                'smtp_tls_loglevel = 1',
                'smtpd_tls_security_level = encrypt', 'smtpd_tls_cert_file = ' + self.path('cert.pem'),
                'smtpd_tls_key_file = ' + self.path('key.pem'), 'smtp_tls_CAfile = ' + self.path('cert.pem'),
                'smtp_tls_security_level = verify', 'smtp_tls_verify_cert_match = localhost',
                'smtp_dns_support_level = disabled',
                'smtp_host_lookup = native', 'relay_domains = relay.test',
                'relay_transport = smtp:[localhost]:%d' % relay,
                *options, '')))
            master = pathlib.Path(self.path('etc/master.cf'))
            master.write_text(master.read_text() + 'smtp unix - - n - - smtp\ntlsmgr unix - - n 1000? 1 tlsmgr\n')

    told = []
    # As the next server.
    with Postfix(1, []) as server, \
            Program(path, *ours, 0, 'localhost', server.port, 'starttls', certificates.cert) as program:
        program.send('Subject: Test\n\nHello, Postfix\n', to='you@example.test')
        (message,) = server.wait_for(1)
        assert b'Hello, Postfix' in message.content and b'with ESMTPS id' in message.raw, message.raw
        told.append('Postfix behind it')
    # As the client.
    for smtps in False, True:
        with Both(pathlib.Path(path).parent / 'tls_server', *ours, 0, 0) as program:
            port, wrapped = (program.smtps, ['smtp_tls_wrappermode = yes']) if smtps else (program.port, [])
            with Postfix(port, wrapped) as client:
                with smtplib.SMTP(HOST, client.port, 'x', PATIENCE) as smtp:
                    smtp.starttls()
                    smtp.sendmail('me@example.com', 'you@relay.test', 'Subject: Test\n\nHello from Postfix\n')
                program.read_until(b'Hello from Postfix')
                log = pathlib.Path(client.log).read_text()
                assert 'Verified TLS connection established to localhost' in log, log
        told.append('Postfix as a client' + ' with SMTPS' * smtps)
    return told


def half_of_a_hello(certificates):
    """The first bytes that a client says in TLS."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = certificates.client().wrap_bio(incoming, outgoing, server_hostname='localhost')
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def closed(sock, patience=PATIENCE):
    """What it still says until it closes."""
    sock.settimeout(patience)
    said = b''
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            said += piece
    return said


def tls_test(path):
    told = []
    with Certificates() as certificates:
        hello = half_of_a_hello(certificates)

        def server(idle=60000, in_buffer=65536, *system_buffer):
            return Both(path, 'serve', certificates.cert, certificates.key, idle, in_buffer, *system_buffer)

        with server() as program:
            before = program.descriptors()
            # Commands before the handshake, in one packet with STARTTLS: none of them counts.
            for attack in b'MAIL FROM:<eve@example.com>\r\n', \
                    b'EHLO eve\r\nMAIL FROM:<eve@example.com>\r\nRCPT TO:<x@y>\r\n', b'RSET\r\nDATA\r\n', \
                    b'NOO', b'\r\n', b'STARTTLS\r\n', b'NOOP\r\n' * 10000:
                with Talk(program, certificates, plain=True) as talk:
                    talk.says('EHLO x', '250')
                    with contextlib.suppress(ConnectionError, ssl.SSLError):
                        talk.start_tls(attack)
                        # What came in other packets breaks the handshake; if all was in one, nothing of it is left.
                        talk.says('NOOP', '250 OK\r\n')
                        talk.says('MAIL FROM:<me@example.com>', '503 Error: send HELO first')
                        talk.says('EHLO x', '250-')
                        talk.says('RCPT TO:<you@example.com>', '503 Error: need MAIL command')
                        attack = None
                    assert attack in (None, b'NOOP\r\n' * 10000), 'the handshake failed after %r' % attack

            # Handshakes that stand still: nothing said, half said, plain text, an answer that nobody reads.
            stalled = []
            for smtps in False, True:
                for said in b'', hello[:5], hello[:-1], hello:
                    sock = program.raw(program.smtps if smtps else program.port)
                    if not smtps:
                        sock.sendall(b'STARTTLS\r\n')
                        heard = b''
                        while not heard.endswith(b'start TLS\r\n'):
                            heard += sock.recv(1000)
                    sock.sendall(said)
                    stalled.append(sock)
            time.sleep(0.1)
            used = program.idles(1.5, 'stalled handshakes')
            told.append('%d stalled handshakes: %.2f s of processor time in 1.5 s' % (len(stalled), used))
            program.is_well(certificates)   # nobody waits for them
            for sock in stalled:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                sock.close()   # a reset

            # No TLS at all.
            for said in b'EHLO x\r\n', b'GET / HTTP/1.0\r\n\r\n', os.urandom(1000), \
                    b'\x16\x03\x01\xff\xff' + b'x' * 70000, b'\x15' * 20:
                with contextlib.suppress(OSError):
                    sock = program.raw(program.smtps)
                    sock.sendall(said)
                    sock.shutdown(socket.SHUT_WR)
                    closed(sock)
                sock.close()
            program.is_well(certificates)

            # A handshake that comes byte by byte, and a conversation.
            for smtps in False, True:
                slowly = Splitter(program.smtps if smtps else program.port)
                slowly.raw = lambda port=None: socket.create_connection((HOST, slowly.port), PATIENCE)
                slowly.smtps = slowly.port
                with Talk(slowly, certificates, smtps) as talk:
                    talk.send('Hello')

            # Urgent bytes, before, in and after the handshake.
            with Talk(program, certificates, plain=True) as talk:
                raw = socket.socket(fileno=os.dup(talk.sock.fileno()))
                raw.send(b'!', socket.MSG_OOB)
                talk.says('NOOP', '250 OK')
                talk.start_tls()
                for _ in range(3):
                    raw.send(b'!', socket.MSG_OOB)
                    talk.says('NOOP', '250 OK')
                program.process.send_signal(signal.SIGSTOP)   # it finds all of that at once
                talk.sock.sendall(b'NOOP\r\n')
                talk.sock.sendall(b'NOOP\r\n')
                raw.send(b'!', socket.MSG_OOB)
                program.process.send_signal(signal.SIGCONT)
                same([talk.line() for _ in range(2)], ['250 OK\r\n'] * 2)
                program.idles(0.5, 'an urgent byte')
                talk.says('EHLO x', '250-')
                raw.close()
            sock = program.raw(program.smtps)
            sock.send(b'!', socket.MSG_OOB)
            program.idles(0.5, 'an urgent byte in the handshake')
            with certificates.client().wrap_socket(sock, server_hostname='localhost') as tls:
                assert tls.recv(4) == b'220 '

            # A client that sends and does not read: what it is owed waits, without work, and comes.
            with Talk(program, certificates, smtps=True) as talk:
                talk.sock.settimeout(1)
                sent = 0
                line = b'NOOP\r\n' * 1000
                with contextlib.suppress(socket.timeout, ssl.SSLWantWriteError):
                    while sent < 100000000:
                        sent += talk.sock.send(line[sent % len(line):])
                talk.sock.settimeout(PATIENCE)
                used = program.idles(1.0, 'a client that does not read')
                told.append('a client that does not read: %.2f s in 1 s' % used)
                heard = 0
                for _ in range(sent // 6):
                    heard += talk.line() == '250 OK\r\n'
                same(heard, sent // 6)

            # And with STARTTLS behind all that has to be sent first.
            with Talk(program, certificates, plain=True) as talk:
                talk.sock.sendall(b'NOOP\r\n' * 200000 + b'STARTTLS\r\n')
                heard = b''
                with contextlib.suppress(ConnectionError):
                    while not heard.endswith(b'start TLS\r\n') and (piece := talk.sock.recv(65536)):
                        heard = heard[-20:] + piece
            program.is_well(certificates)

            # Gone in the middle of an answer: no SIGPIPE.
            for smtps in False, True:
                for _ in range(20):
                    with Talk(program, certificates, smtps) as talk:
                        talk.sock.sendall(b'NOOP\r\n' * 20000)
                        talk.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            program.is_well(certificates)
            same(program.process.poll(), None)
            end = time.monotonic() + PATIENCE
            while program.descriptors() > before:
                assert time.monotonic() < end, 'connections that have ended are still open'
                time.sleep(0.05)

        # A client that makes TLS itself answer, and does not read that.
        with server(60000, 65536, 4096) as program:
            with Program(path, 'flood', program.smtps, announced=False) as client:
                client.read_until(b'blocked')
                used = program.idles(1.0, 'a client that asks for new keys')
                told.append('new keys and no end: %.2f s in 1 s' % used)
            program.is_well(certificates)

        # All that a record holds is handled, however little is read at a time; and none of it is lost.
        for in_buffer in 65536, 100, 1:
            with server(in_buffer=in_buffer) as program:
                for smtps in False, True:
                    with Talk(program, certificates, smtps) as talk:
                        talk.sock.sendall(b'NOOP\r\n' * 2730)   # 16,380 bytes, one record
                        for _ in range(2730):
                            same(talk.line(), '250 OK\r\n')
                        if in_buffer == 1:
                            continue
                        text = 'y' * 70 + '\r\n'
                        start = time.monotonic()
                        lines = 100000 if in_buffer > 1000 else 5000
                        heard = talk.send(text * lines)
                        assert heard.endswith(' of %d bytes\r\n' % (71 * lines)), heard
                        if in_buffer > 1000 and smtps:
                            told.append('7.2 MB in %.2f s' % (time.monotonic() - start))
                program.idles(0.3, 'nothing to do')

        # The idle clock runs during the handshake, whatever comes in it; afterwards the client is told.
        with server(idle=2000) as program:
            for smtps in False, True:
                for drip in False, True:
                    sock = program.raw(program.smtps if smtps else program.port)
                    if not smtps:
                        sock.sendall(b'STARTTLS\r\n')
                        while not sock.recv(1000).endswith(b'start TLS\r\n'):
                            pass
                    start = time.monotonic()
                    with contextlib.suppress(ConnectionError):
                        for byte in hello if drip else b'':
                            sock.sendall(bytes([byte]))
                            time.sleep(0.05)
                            assert time.monotonic() - start < 5, 'a handshake that comes byte by byte goes on for ever'
                    same(closed(sock), b'')
                    assert 1.7 < time.monotonic() - start < 3.9, time.monotonic() - start   # not twice as long
                with Talk(program, certificates, smtps) as talk:
                    same(talk.line(), '421 Error: timeout exceeded\r\n')
                    same(talk.sock.recv(1), b'')

        # The client's side: a server that says nothing in the handshake, with and without STARTTLS.
        silent = offers_STARTTLS(b'220 go\r\n')
        start = time.monotonic()

        def ask(port, how, name='localhost', ms=300):
            return run(path, 'ask', 'localhost', port, how, certificates.cert, ms, name).stdout.decode()

        same(ask(silent.port, 'starttls'), '-1 no answer in time\n')
        silent = Fake(0, b'', lambda line: b'')
        same(ask(silent.port, 'smtps'), '-1 no answer in time\n')
        assert 0.5 < time.monotonic() - start < 8
        # `offered`: with TLS where there is some, and without it where there is none; LMTP says LHLO both times.
        lines = []
        plain = Fake(0, b'220 x\r\n', lambda line: lines.append(line) or b'250 HELP\r\n')
        same(ask(plain.port, 'offered', ms=5000), '250 HELP\n')
        same(lines[0], b'LHLO tester\r\n')
        # A name that is none is no reason to take any certificate.
        with TLSServer(certificates.cert, certificates.key, True) as there:
            same(ask(there.port, 'smtps', name=''), '-1 TLS: there is no name to check\n')
        same(ask(offers_STARTTLS(b'220 go\r\n').port, 'starttls', name=''), '-1 TLS: there is no name to check\n')
    return '; '.join(told)


class Splitter:
    """Passes each byte on by itself, for one connection."""

    def __init__(self, port):
        self.listener = socket.create_server((HOST, 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, args=(port,), daemon=True).start()

    def serve(self, port):
        near = self.listener.accept()[0]
        far = socket.create_connection((HOST, port))
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=self.copy, args=(far, near, 65536), daemon=True)
        back.start()
        self.copy(near, far, 1)
        back.join()
        near.close()
        far.close()
        self.listener.close()

    @staticmethod
    def copy(source, target, size):
        with contextlib.suppress(OSError):
            while piece := source.recv(size):
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)


def main():
    name = sys.argv[1]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))   # which ends what it has started
    result = globals()[name](sys.argv[2])
    print('ok: %s: %s%s' % (name, result, ''.join('; skipped: ' + tool for tool in missing)), flush=True)


if __name__ == '__main__':
    main()

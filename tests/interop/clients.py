"""Real mail clients: swaks, smtplib, curl, msmtp, smtp-source.

Each client sends a `Message` to a server and the call returns a `Sent`: what
a server must have received, so that a test can compare it with what did
arrive.  Every message already has the header fields that a client might add.

    for client in CLIENTS:
        sent = client.send('127.0.0.1', 1025, MESSAGES['dots'])
        ... sent.data, sent.mailfrom, sent.rcpttos ...

A client that is not installed raises MissingTool.

What the clients can do (the versions of Debian 12):

    client       SMTPUTF8   recipients   without SMTPUTF8 a UTF-8 address is
    swaks        no         many         sent in UTF-8, without the parameter
    smtplib      yes        many         -
    curl         yes        many         -
    msmtp        no         many         sent in UTF-8, without the parameter
    smtp-source  no         one          sent in UTF-8, without the parameter
"""

import collections
import os
import smtplib
import subprocess
import tempfile

from upstreams import find_tool

# ---------------------------------------------------------------------------
# What is sent.

Message = collections.namedtuple('Message', 'kind mailfrom rcpttos content')
Message.__doc__ = """A message to send; all of its lines end with LF."""

Sent = collections.namedtuple(
    'Sent', 'mailfrom rcpttos data options accepted output')
Sent.__doc__ = """What a client did.

mailfrom, rcpttos  the envelope
data               the content, dots unstuffed, CRLF turned into LF, and
                   without the end of its last line: what a server gets for
                   which the data ends with CRLF.CRLF
options            parameters that MAIL must have had (of those offered)
accepted           whether the client says that its message was taken
output             what the client printed
"""


def _message(kind, body, mailfrom='author@example.test',
             rcpttos=('recipient@example.test',)):
    head = ('From: <%s>\n'
            'To: <%s>\n'
            'Subject: a message of kind %s\n'
            'Date: Sat, 01 Jan 2022 00:00:00 +0000\n'
            'Message-ID: <%s@example.test>\n'
            'MIME-Version: 1.0\n'
            'Content-Type: text/plain; charset=utf-8\n'
            'Content-Transfer-Encoding: 8bit\n'
            '\n' % (mailfrom, rcpttos[0], kind, kind))
    return Message(kind, mailfrom, list(rcpttos), head.encode() + body)


def _ten_mebibytes():
    """10 MiB of short numbered lines: a lost or moved line is seen."""
    lines = []
    size = 0
    n = 0
    while size < 10 * 1024 * 1024:
        line = b'%s%08d %s\n' % (b'.' if n % 50 == 0 else b'', n, b'x' * 66)
        lines.append(line)
        size += len(line)
        n += 1
    return b''.join(lines)


MESSAGES = {m.kind: m for m in (
    _message('plain',
             b'Hello,\n\nthis is a plain message.\n\n\nThe end.\n',
             rcpttos=('recipient@example.test', 'another@example.test')),
    _message('dots',
             # swaks takes a '.' on the very last line for the end of the data.
             b'.\n..\n...\n.leading\n..two\n. blank\n\n.\n\nin . between.\n'
             b'.\n.\n..\n'),
    _message('8bit',
             b'every byte above 127:\n'
             + bytes(range(128, 256)) + b'\n'
             + bytes(range(255, 127, -1)) + b'\n.\xff\n\xff.\n\x85\n'),
    _message('8bit-text',
             'Gr\u00fc\u00dfe, \u4f60\u597d, \U0001f4ec\u2028\n.\u00e9\n'
             .encode()),
    _message('utf8-address',
             'text with \u00fc\n'.encode(),
             mailfrom='\u00fcber@example.test',
             rcpttos=('empf\u00e4nger@example.test',)),
    _message('10MiB', _ten_mebibytes()),
)}


# ---------------------------------------------------------------------------
# Who sends it.

class Client:
    """One client; `send` is the same for all."""

    name = ''
    package = ''            # the Debian package it is in
    smtputf8 = False        # says SMTPUTF8 where the addresses need it
    many_recipients = True  # several recipients in one transaction
    eight_bit = ()          # the parameters for a message with 8-bit content
    adds = b''              # what it puts behind the message
    timeout = 60

    @classmethod
    def tool(cls):
        """The path of the program; MissingTool if there is none."""
        return find_tool(cls.name, cls.package)

    def send(self, host, port, message):
        rcpttos = message.rcpttos if self.many_recipients \
            else message.rcpttos[:1]
        options = []
        if not _is_ascii(message.content):
            options += self.eight_bit
        if self.needs_smtputf8(message) and self.smtputf8:
            options.append('SMTPUTF8')
        accepted, output = self._send(host, port, message.mailfrom, rcpttos,
                                      message.content, options)
        return Sent(message.mailfrom, rcpttos,
                    message.content[:-1] + self.adds, options,
                    accepted, output)

    @staticmethod
    def needs_smtputf8(message):
        return not _is_ascii(''.join([message.mailfrom] + message.rcpttos)
                             .encode())

    def _send(self, host, port, mailfrom, rcpttos, content, options):
        raise NotImplementedError

    def _run(self, command, stdin=b''):
        """Run a program: (it exited with 0, what it printed)."""
        result = subprocess.run(
            command, input=stdin, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=self.timeout,
            env={'PATH': os.environ.get('PATH', os.defpath),
                 'HOME': '/nonexistent', 'LC_ALL': 'C.UTF-8'})
        return (result.returncode == 0,
                result.stdout.decode('utf-8', 'replace'))


def _is_ascii(text):
    return all(byte < 128 for byte in text)


def _crlf(content):
    return content.replace(b'\n', b'\r\n')


class _File:
    """The content in a file, for the clients that want one."""

    def __init__(self, content):
        self.content = content

    def __enter__(self):
        self.file = tempfile.NamedTemporaryFile(prefix='interop-')
        self.file.write(self.content)
        self.file.flush()
        return self.file.name

    def __exit__(self, *exc):
        self.file.close()


class Swaks(Client):
    name = 'swaks'
    package = 'swaks'

    def _send(self, host, port, mailfrom, rcpttos, content, options):
        # It adds a line end of its own to the data.
        with _File(content[:-1]) as path:
            return self._run([
                self.tool(), '--server', host, '--port', str(port),
                '--helo', 'client.example.test', '--from', mailfrom,
                '--to', ','.join(rcpttos), '--data', '@' + path,
                '--hide-all', '--timeout', '30'])


class Smtplib(Client):
    name = 'smtplib'
    smtputf8 = True
    eight_bit = ('BODY=8BITMIME',)

    def _send(self, host, port, mailfrom, rcpttos, content, options):
        try:
            with smtplib.SMTP(host, port, 'client.example.test',
                              timeout=30) as smtp:
                smtp.ehlo_or_helo_if_needed()
                if not smtp.has_extn('8bitmime'):
                    options[:] = [o for o in options
                                  if o not in self.eight_bit]
                # Bytes are sent as they are, but for the dots.
                refused = smtp.sendmail(mailfrom, rcpttos, _crlf(content),
                                        mail_options=list(options))
            return not refused, str(refused)
        except (smtplib.SMTPException, OSError) as e:
            return False, repr(e)


class Curl(Client):
    name = 'curl'
    package = 'curl'
    smtputf8 = True

    def _send(self, host, port, mailfrom, rcpttos, content, options):
        command = [self.tool(), '--disable', '--silent', '--show-error',
                   '--noproxy', '*', '--max-time', '30',
                   '--url', 'smtp://%s:%d/client.example.test' % (host, port),
                   '--mail-from', mailfrom]
        for rcpt in rcpttos:
            command += ['--mail-rcpt', rcpt]
        with _File(_crlf(content)) as path:
            return self._run(command + ['--upload-file', path])


class Msmtp(Client):
    name = 'msmtp'
    package = 'msmtp'

    def _send(self, host, port, mailfrom, rcpttos, content, options):
        return self._run([
            self.tool(), '--file=/dev/null',
            '--host=' + host, '--port=%d' % port,
            '--domain=client.example.test', '--tls=off', '--auth=off',
            '--timeout=30', '--from=' + mailfrom, '--'] + rcpttos,
            stdin=content)


class SmtpSource(Client):
    name = 'smtp-source'
    package = 'postfix'
    many_recipients = False
    adds = b'\n'        # always one empty line

    def _send(self, host, port, mailfrom, rcpttos, content, options):
        with _File(content) as path:
            return self._run([
                self.tool(), '-m', '1', '-s', '1', '-M', 'client.example.test',
                '-f', mailfrom, '-t', rcpttos[0], '-F', path,
                '%s:%d' % (host, port)])


CLIENTS = [Swaks(), Smtplib(), Curl(), Msmtp(), SmtpSource()]

"""Real mail servers for the interoperability tests, each one private.

Every class here starts a server in a temporary folder of its own, with a
configuration of its own, on a free port of 127.0.0.1, and stops it by its
process id.  Nothing in /etc or /var is read for settings or changed.  Use
them as context managers:

    with Postfix() as postfix:
        ... send to postfix.host, postfix.port ...
        for message in postfix.wait_for(1):
            print(message.recipient, message.content)

What is here:

    RecordingSink  a small SMTP server in Python that remembers what it got
    SmtpSink       Postfix's smtp-sink, with its fault options
    Postfix        a whole Postfix, delivering to a Maildir
    Exim           a whole Exim, from its unpacked Debian package, likewise
    Mailman        a Mailman 3 with two lists, its LMTP and REST services

They need root: Postfix and Exim give up root themselves, and refuse to run
without having had it.  Only the Python standard library is used.
"""

import base64
import collections
import contextlib
import json
import os
import pwd
import random
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

HOST = '127.0.0.1'
POLL = 0.02     # seconds between two looks at something that has no event


class MissingTool(Exception):
    """What is needed is not installed here: the test may skip itself."""


# ---------------------------------------------------------------------------
# Ports, waiting, processes, folders.

_ports_given = set()


def free_port():
    """A port of 127.0.0.1 that nothing uses, for a server to listen on.

    It lies below the range from which the kernel takes the ports of outgoing
    connections.  A port of that range could be taken by a client while its
    server is stopped, and a client that calls a closed port in that range can
    even be connected to itself.
    """
    with open('/proc/sys/net/ipv4/ip_local_port_range') as f:
        low = int(f.read().split()[0])
    if low < 12000:
        low = 65000
    for _ in range(10000):
        port = random.randrange(10000, low)
        if port in _ports_given:
            continue
        with contextlib.closing(socket.socket()) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((HOST, port))
            except OSError:
                continue
        _ports_given.add(port)
        return port
    raise RuntimeError('no free port')


def wait_until(check, timeout, what):
    """Call `check` until it returns something true, and return that."""
    end = time.monotonic() + timeout
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError('timed out: %s' % what)
        time.sleep(POLL)


def greeting(port):
    """The greeting of the server on this port, or b'' if there is none."""
    try:
        with socket.create_connection((HOST, port), 5) as s:
            line = s.makefile('rb').readline()
            s.sendall(b'QUIT\r\n')
            return line
    except OSError:
        return b''


def wait_for_greeting(port, process, timeout=30, log=None):
    def check():
        if process is not None and process.poll() is not None:
            raise RuntimeError('the server on port %d ended with status %s%s'
                               % (port, process.returncode, tail(log)))
        return greeting(port).startswith(b'220')
    try:
        wait_until(check, timeout, 'greeting on port %d' % port)
    except TimeoutError as e:
        raise RuntimeError('%s%s' % (e, tail(log))) from None


def tail(path, lines=30):
    """The end of a log file, for an error message."""
    try:
        with open(path, errors='replace') as f:
            return '\n' + ''.join(f.readlines()[-lines:])
    except (OSError, TypeError):
        return ''


def descendants(pid):
    """The process ids of a process and of all that it has started."""
    children = collections.defaultdict(list)
    for name in os.listdir('/proc'):
        if name.isdigit():
            try:
                with open('/proc/%s/stat' % name, 'rb') as f:
                    fields = f.read().rpartition(b')')[2].split()
            except OSError:
                continue
            children[int(fields[1])].append(int(name))
    found = [pid]
    for p in found:
        found.extend(children[p])
    return found


def kill_tree(process):
    """End a process and its descendants at once, as a power cut would.

    All are stopped before the first is killed, so that none of them sees
    another one go and acts on it, and none is started meanwhile.
    """
    stopped = []
    while process.poll() is None:
        running = [p for p in descendants(process.pid) if p not in stopped]
        if not running:
            break
        _signal(running, signal.SIGSTOP)
        wait_until(lambda: all(_state(p) in 'TtZX' for p in running), 10,
                   'stop of processes %s' % running)
        stopped += running
    _signal(stopped, signal.SIGKILL)
    process.wait()
    wait_until(lambda: all(_state(p) in 'ZX' for p in stopped), 10,
               'end of processes %s' % stopped)


def _signal(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _state(pid):
    """The letter that the kernel has for what a process does; X: it's gone."""
    try:
        with open('/proc/%d/stat' % pid) as f:
            return f.read().rpartition(')')[2].split()[0]
    except OSError:
        return 'X'


def stop_process(process, pid=None, timeout=15):
    """Ask a process to end, and see that its descendants end with it.

    `pid` is the one to be asked, if that is not the process itself.
    """
    if process is None or process.poll() is not None:
        return
    family = descendants(process.pid)
    try:
        os.kill(pid or process.pid, signal.SIGTERM)
        process.wait(timeout)
        wait_until(lambda: all(_state(p) in 'ZX' for p in family), timeout,
                   'end of processes %s' % family)
    except (subprocess.TimeoutExpired, ProcessLookupError, TimeoutError):
        kill_tree(process)
        _signal([p for p in family if _state(p) not in 'ZX'], signal.SIGKILL)


def find_tool(name, package):
    path = shutil.which(name, path=os.environ.get('PATH', os.defpath)
                        + ':/usr/sbin:/sbin:/usr/local/sbin')
    if path is None:
        raise MissingTool('%s (Debian package %s)' % (name, package))
    return path


def need_root(what):
    if os.geteuid() != 0:
        raise MissingTool('root, for %s' % what)


class Server:
    """What all servers here share: a folder, a port, a with statement."""

    host = HOST

    def __init__(self, port=None):
        self.port = port or free_port()
        self.folder = tempfile.mkdtemp(prefix='interop-')
        os.chmod(self.folder, 0o755)
        self.process = None

    @property
    def address(self):
        return '%s:%d' % (self.host, self.port)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def write(self, name, text, mode=0o644):
        with open(self.path(name), 'w') as f:
            f.write(text)
        os.chmod(self.path(name), mode)
        return self.path(name)

    def start(self):
        raise NotImplementedError

    def stop(self):
        stop_process(self.process)

    def kill(self):
        """A crash: no process of the server runs another instruction."""
        kill_tree(self.process)

    def restart(self):
        """Start again on the same port and with the same data."""
        self.stop()
        self.start()

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc):
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


# ---------------------------------------------------------------------------
# A Maildir and the messages in it.

Delivered = collections.namedtuple(
    'Delivered', 'content sender recipient queue_id raw')
Delivered.__doc__ = """One file of a Maildir.

content    the message as its sender wrote it, lines ended by LF
sender     the envelope sender;  recipient  the envelope recipient
queue_id   the server's own name for the transaction that brought it
raw        the whole file, trace headers included
"""

_TRACE = (b'return-path', b'x-original-to', b'delivered-to', b'envelope-to',
          b'delivery-date', b'received')
_QUEUE_ID = re.compile(rb'\bid\s+([0-9A-Za-z-]+)')


def parse_delivered(raw):
    """Take off the header fields that the delivering server put on top.

    They end with the first Received field: what follows is the message.
    """
    fields = {}
    rest = raw
    while b'received' not in fields:
        match = re.match(rb'([!-9;-~]+):((?:.*\n)(?:[ \t].*\n)*)', rest)
        if not match or match.group(1).lower() not in _TRACE:
            break
        fields[match.group(1).lower()] = match.group(2).strip()
        rest = rest[match.end():]
    queue_id = _QUEUE_ID.search(fields.get(b'received', b''))
    recipient = fields.get(b'x-original-to') or fields.get(b'envelope-to')
    return Delivered(
        content=rest, raw=raw,
        sender=(fields.get(b'return-path') or b'').strip(b'<>').decode(),
        recipient=(recipient or b'').decode(),
        queue_id=queue_id.group(1).decode() if queue_id else '')


class MaildirServer(Server):
    """A server that delivers everything to the Maildir self.maildir."""

    maildir = None

    def messages(self):
        """All that has been delivered, in the order of the file names."""
        folder = os.path.join(self.maildir, 'new')
        try:
            names = sorted(os.listdir(folder))
        except FileNotFoundError:
            return []
        found = []
        for name in names:
            with open(os.path.join(folder, name), 'rb') as f:
                found.append(parse_delivered(f.read()))
        return found

    def count(self):
        try:
            return len(os.listdir(os.path.join(self.maildir, 'new')))
        except FileNotFoundError:
            return 0

    def clear(self):
        """Forget what has been delivered."""
        folder = os.path.join(self.maildir, 'new')
        if os.path.isdir(folder):
            for name in os.listdir(folder):
                os.unlink(os.path.join(folder, name))

    def queued(self):
        """How many messages the server still has in its queue."""
        raise NotImplementedError

    def wait_for(self, n, timeout=60):
        """Wait until at least n messages have been delivered."""
        wait_until(lambda: self.count() >= n, timeout,
                   '%d messages delivered' % n)
        return self.messages()

    def wait_idle(self, timeout=60):
        """Wait until nothing is queued any more: what came is delivered."""
        wait_until(lambda: self.queued() == 0, timeout, 'an empty queue')
        return self.messages()


# ---------------------------------------------------------------------------
# Postfix.

_POSTFIX_MAIN = """\
compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
maillog_file = {folder}/mail.log
maillog_file_prefixes = {folder}
myhostname = mail.example.test
mydomain = example.test
myorigin = example.test
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
smtputf8_enable = yes
enable_long_queue_ids = yes

# Everything for these domains is delivered to one Maildir; all else is
# refused, and nothing can leave this machine.
mydestination =
alias_maps =
local_recipient_maps =
relay_domains =
virtual_mailbox_domains = {domains}
virtual_mailbox_maps = static:box/
virtual_mailbox_base = {folder}/mail
virtual_uid_maps = static:{uid}
virtual_gid_maps = static:{gid}
virtual_transport = virtual
default_transport = error:nothing leaves this machine
relay_transport = error:nothing leaves this machine
mynetworks =
smtpd_relay_restrictions = reject_unauth_destination
notify_classes =

# Messages are kept as they come, the address rewriting included.
local_header_rewrite_clients =
remote_header_rewrite_domain =
header_size_limit = 10485760
message_size_limit = 52428800
mailbox_size_limit = 0
virtual_mailbox_limit = 0

# The guards that Postfix gained against SMTP smuggling stay off: this server
# stands for the many that still take a bare LF for a line end, so a relay in
# front of it must not pass one on.
smtpd_forbid_bare_newline = no
smtpd_forbid_unauth_pipelining = no

# No limits but those, no waiting.
smtpd_peername_lookup = no
smtpd_client_connection_count_limit = 0
smtpd_client_connection_rate_limit = 0
smtpd_error_sleep_time = 0
smtpd_soft_error_limit = 100000
smtpd_hard_error_limit = 100000
smtpd_junk_command_limit = 100000
smtpd_recipient_limit = 2000
default_process_limit = 100
in_flow_delay = 0
virtual_destination_concurrency_limit = 20
queue_run_delay = 1s
minimal_backoff_time = 1s
maximal_backoff_time = 1s
transport_retry_time = 1s
"""

_POSTFIX_MASTER = """\
127.0.0.1:{port} inet n - n - 100 smtpd
cleanup  unix       n - n - 0   cleanup
qmgr     unix       n - n 300 1 qmgr
rewrite  unix       - - n - -   trivial-rewrite
bounce   unix       - - n - 0   bounce
defer    unix       - - n - 0   bounce
trace    unix       - - n - 0   bounce
verify   unix       - - n - 1   verify
flush    unix       n - n 1000? 0 flush
proxymap unix       - - n - -   proxymap
error    unix       - - n - -   error
retry    unix       - - n - -   error
discard  unix       - - n - -   discard
virtual  unix       - n n - 10  virtual
anvil    unix       - - n - 1   anvil
scache   unix       - - n - 1   scache
showq    unix       n - n - -   showq
postlog  unix-dgram n - n - 1   postlogd
"""


class Postfix(MaildirServer):
    """A running Postfix that takes mail for its domains, any local part."""

    def __init__(self, port=None, domains=('example.test',)):
        self.postfix = find_tool('postfix', 'postfix')
        need_root('Postfix')
        super().__init__(port)
        nobody = pwd.getpwnam('nobody')
        os.mkdir(self.path('etc'))
        for name, owner in (('queue', 'root'), ('data', 'postfix'),
                            ('mail', 'nobody')):
            os.mkdir(self.path(name))
            shutil.chown(self.path(name), owner)
        values = dict(folder=self.folder, port=self.port,
                      domains=', '.join(domains),
                      uid=nobody.pw_uid, gid=nobody.pw_gid)
        self.write('etc/main.cf', _POSTFIX_MAIN.format(**values))
        self.write('etc/master.cf', _POSTFIX_MASTER.format(**values))
        self.maildir = self.path('mail', 'box')
        # Postfix's programs write here as root and as the user postfix.
        self.log = self.write('mail.log', '', 0o666)

    def start(self):
        with open(self.path('output'), 'ab') as output:
            self.process = subprocess.Popen(
                [self.postfix, '-c', self.path('etc'), 'start-fg'],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin'})
        wait_for_greeting(self.port, self.process, log=self.path('output'))

    def stop(self):
        # The process that was started is a shell that waits for this one.
        try:
            with open(self.path('queue', 'pid', 'master.pid')) as f:
                master = int(f.read())
        except (OSError, ValueError):
            master = None
        stop_process(self.process, master)

    def queued(self):
        # A file gets its execute bit when the message in it is complete; one
        # without is what a crash left of a message that was not accepted.
        n = 0
        for name in ('maildrop', 'incoming', 'active', 'deferred'):
            for folder, _, files in os.walk(self.path('queue', name)):
                for file in files:
                    with contextlib.suppress(FileNotFoundError):
                        mode = os.stat(os.path.join(folder, file)).st_mode
                        n += bool(mode & 0o100)
        return n


# ---------------------------------------------------------------------------
# Exim.

_EXIM_CONFIGURE = """\
exim_path = {folder}/package/usr/sbin/exim4
keep_environment = LD_PRELOAD : NSS_WRAPPER_PASSWD : NSS_WRAPPER_GROUP
primary_hostname = mx.example.test
spool_directory = {folder}/spool
log_file_path = {folder}/log/%slog
pid_file_path = {folder}/run/exim.pid
local_interfaces = 127.0.0.1
daemon_smtp_ports = {port}
deliver_drop_privilege
never_users =
tls_advertise_hosts =
host_lookup =
rfc1413_query_timeout = 0s
helo_allow_chars = _
smtputf8_advertise_hosts = *
accept_8bitmime = true
message_size_limit = 50M
smtp_accept_max = 200
smtp_accept_max_per_connection = 0
smtp_accept_queue_per_connection = 0
queue_run_in_order = false
acl_smtp_rcpt = check_rcpt
acl_smtp_data = check_data

begin acl

check_rcpt:
  accept  domains = {domains}
  deny    message = relay not permitted

check_data:
  accept

begin routers

everything:
  driver = accept
  transport = box

begin transports

box:
  driver = appendfile
  directory = {folder}/mail/box
  maildir_format
  create_directory
  return_path_add
  envelope_to_add
  delivery_date_add

begin retry

* * F,1h,1s
"""

_EXIM_UID = 64998


class Exim(MaildirServer):
    """A running Exim that takes mail for its domains, any local part.

    Debian's Exim and Postfix packages exclude each other, so Exim's is only
    unpacked, not installed.  The binary insists on a user named Debian-exim:
    libnss-wrapper shows it one without touching /etc/passwd.
    """

    def __init__(self, port=None, domains=('example.test',)):
        need_root('Exim')
        super().__init__(port)
        try:
            self.binary = self._unpack()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        for name in ('spool', 'log', 'run', 'mail'):
            os.mkdir(self.path(name), 0o755)
            os.chown(self.path(name), _EXIM_UID, _EXIM_UID)
        with open('/etc/passwd') as passwd, open('/etc/group') as group:
            self.write('passwd', passwd.read()
                       + 'Debian-exim:x:%d:%d::%s:/usr/sbin/nologin\n'
                       % (_EXIM_UID, _EXIM_UID, self.path('spool')))
            self.write('group', group.read()
                       + 'Debian-exim:x:%d:\n' % _EXIM_UID)
        self.write('exim.conf', _EXIM_CONFIGURE.format(
            folder=self.folder, port=self.port, domains=' : '.join(domains)))
        self.maildir = self.path('mail', 'box')
        self.log = self.path('log', 'mainlog')
        self.env = {'PATH': '/usr/sbin:/usr/bin:/sbin:/bin',
                    'LD_PRELOAD': 'libnss_wrapper.so',
                    'NSS_WRAPPER_PASSWD': self.path('passwd'),
                    'NSS_WRAPPER_GROUP': self.path('group')}

    def _unpack(self):
        apt = find_tool('apt-get', 'apt')
        dpkg = find_tool('dpkg-deb', 'dpkg')
        result = subprocess.run(
            [apt, 'download', '-q', 'exim4-daemon-light'], cwd=self.folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        packages = [n for n in os.listdir(self.folder) if n.endswith('.deb')]
        if not packages:
            raise MissingTool('exim4-daemon-light (apt-get download): '
                              + result.stdout.decode(errors='replace'))
        subprocess.run([dpkg, '-x', self.path(packages[0]),
                        self.path('package')], check=True)
        binary = self.path('package', 'usr', 'sbin', 'exim4')
        # Not set-uid: this one has root's help at the start and no more.
        os.chmod(binary, 0o755)
        linked = subprocess.run(['ldd', binary], stdout=subprocess.PIPE)
        missing = re.findall(rb'(\S+) => not found', linked.stdout)
        if missing:
            raise MissingTool('shared libraries for Exim: '
                              + b' '.join(missing).decode())
        probe = subprocess.run(
            [binary, '-bV'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={'LD_PRELOAD': 'libnss_wrapper.so'})
        if b'cannot be preloaded' in probe.stdout:
            raise MissingTool('libnss_wrapper.so (Debian package '
                              'libnss-wrapper)')
        return binary

    def start(self):
        with open(self.path('output'), 'ab') as output:
            self.process = subprocess.Popen(
                [self.binary, '-C', self.path('exim.conf'), '-bdf', '-q1s'],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=self.env)
        wait_for_greeting(self.port, self.process, log=self.path('output'))

    def queued(self):
        try:
            return len([n for n in os.listdir(self.path('spool', 'input'))
                        if n.endswith('-H')])
        except FileNotFoundError:
            return 0


# ---------------------------------------------------------------------------
# smtp-sink.

Sunk = collections.namedtuple('Sunk', 'mail_args rcpt_args content')


class SmtpSink(Server):
    """Postfix's smtp-sink; `options` are its own, as strings.

    With dump=True every message is kept and messages() reads them.
    """

    def __init__(self, options=(), dump=True, port=None):
        self.sink = find_tool('smtp-sink', 'postfix')
        super().__init__(port)
        self.options = list(options)
        if dump:
            os.mkdir(self.path('dump'))
            os.chmod(self.path('dump'), 0o777)
            self.options += ['-d', self.path('dump', 'm.')]
        if os.geteuid() == 0:
            self.options += ['-u', 'nobody']

    def start(self):
        self.process = subprocess.Popen(
            [self.sink] + self.options + [self.address, '1000'],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, cwd='/')

        def check():
            # A fault option may spoil the greeting: a connection will do.
            if self.process.poll() is not None:
                raise RuntimeError('smtp-sink ended with status %s'
                                   % self.process.returncode)
            with contextlib.suppress(OSError):
                socket.create_connection((HOST, self.port), 5).close()
                return True
        wait_until(check, 10, 'smtp-sink on port %d' % self.port)

    def messages(self):
        """The messages in the order of their files' times."""
        folder = self.path('dump')
        paths = [os.path.join(folder, n) for n in os.listdir(folder)]
        paths.sort(key=lambda p: os.stat(p).st_mtime_ns)
        return [m for m in map(self._parse, paths) if m]

    def wait_for(self, n, timeout=30):
        wait_until(lambda: len(self.messages()) >= n, timeout,
                   '%d messages in the sink' % n)
        return self.messages()

    @staticmethod
    def _parse(path):
        with open(path, 'rb') as f:
            raw = f.read()
        mail = re.search(rb'^X-Mail-Args: (.*)\n', raw, re.M)
        if not mail:
            return None
        rcpts = []
        end = mail.end()
        while True:
            rcpt = re.compile(rb'X-Rcpt-Args: (.*)\n').match(raw, end)
            if not rcpt:
                break
            rcpts.append(rcpt.group(1).decode(errors='replace'))
            end = rcpt.end()
        received = re.compile(rb'Received: .*\n(?:[ \t].*\n)*').match(raw, end)
        if not received or not raw.endswith(b'\n\n'):
            return None     # not written to its end yet
        return Sunk(mail.group(1).decode(errors='replace'), rcpts,
                    raw[received.end():-1])


# ---------------------------------------------------------------------------
# A sink of our own.

Recorded = collections.namedtuple(
    'Recorded', 'mailfrom mail_options rcpttos content')


class RecordingSink:
    """An SMTP server that takes everything and remembers it, in `messages`.

    `replies` changes what it says: a dictionary from a verb (CONNECT, EHLO,
    MAIL, RCPT, DATA, END for the end of data, ...) to a reply without its
    CRLF, or to a function of the command's line that returns one; where the
    reply is None the ordinary one is given, where it is '' the connection is
    closed.
    """

    host = HOST

    def __init__(self, port=None, replies=None,
                 extensions=('8BITMIME', 'SMTPUTF8', 'SIZE 52428800')):
        self.port = port or free_port()
        self.replies = dict(replies or {})
        self.extensions = list(extensions)
        self.messages = []
        self.changed = threading.Condition()
        self.server = None

    @property
    def address(self):
        return '%s:%d' % (self.host, self.port)

    def __enter__(self):
        sink = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                with contextlib.suppress(OSError, _Closed):
                    sink._serve(self.rfile, self.connection)

        class ThreadingServer(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            request_queue_size = 128

        self.server = ThreadingServer((HOST, self.port), Handler)
        threading.Thread(target=self.server.serve_forever,
                         kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()

    def wait_for(self, check, timeout=30, what='messages in the sink'):
        """Wait until `check`, given the list of messages, returns true.

        A number stands for 'at least so many'.  Returns the messages.
        """
        if isinstance(check, int):
            n = check
            check = lambda messages: len(messages) >= n     # noqa: E731
        with self.changed:
            if not self.changed.wait_for(lambda: check(self.messages),
                                         timeout):
                raise TimeoutError('timed out: %s (there are %d)'
                                   % (what, len(self.messages)))
            return list(self.messages)

    def clear(self):
        with self.changed:
            self.messages.clear()

    def _serve(self, rfile, connection):
        def answer(verb, line, usual):
            reply = self.replies.get(verb)
            if callable(reply):
                reply = reply(line)
            if reply is None:
                reply = usual
            if reply == '':
                raise _Closed
            connection.sendall(reply.encode() + b'\r\n')
            return reply[:1] in '23'

        mailfrom, mail_options, rcpttos = None, [], []
        answer('CONNECT', '', '220 sink.example.test ESMTP')
        while True:
            line = rfile.readline()
            if not line:
                return
            line = line.rstrip(b'\r\n').decode('utf-8', 'surrogateescape')
            verb, _, arg = line.partition(' ')
            verb = verb.upper()
            if verb in ('EHLO', 'LHLO'):
                texts = ['sink.example.test'] + self.extensions
                answer(verb, line, '\r\n'.join(
                    ['250-' + t for t in texts[:-1]] + ['250 ' + texts[-1]]))
            elif verb == 'MAIL':
                address, _, options = arg.partition(':')[2].partition('>')
                if answer(verb, line, '250 OK'):
                    mailfrom = address.strip().lstrip('<')
                    mail_options = options.split()
                    rcpttos = []
            elif verb == 'RCPT':
                address = arg.partition(':')[2].partition('>')[0]
                if answer(verb, line, '250 OK'):
                    rcpttos.append(address.strip().lstrip('<'))
            elif verb == 'DATA':
                if answer(verb, line, '354 go on'):
                    content = self._read_data(rfile)
                    # Kept before the reply: who has the 250 finds it here.
                    message = Recorded(mailfrom, mail_options, rcpttos,
                                       content)
                    with self.changed:
                        self.messages.append(message)
                        self.changed.notify_all()
                    if not answer('END', line, '250 OK'):
                        with self.changed:
                            self.messages[:] = [m for m in self.messages
                                                if m is not message]
                    mailfrom, mail_options, rcpttos = None, [], []
            elif verb == 'RSET':
                answer(verb, line, '250 OK')
                mailfrom, mail_options, rcpttos = None, [], []
            elif verb == 'QUIT':
                answer(verb, line, '221 Bye')
                return
            elif verb in ('HELO', 'NOOP'):
                answer(verb, line, '250 sink.example.test')
            else:
                answer(verb, line, '500 what?')

    @staticmethod
    def _read_data(rfile):
        """The message, lines ended by LF: only CRLF ends a line here."""
        parts = []
        fresh = True        # at the start of a line
        while True:
            part = rfile.readline()
            if not part:
                raise _Closed
            if fresh and part == b'.\r\n':
                return b''.join(parts)
            if fresh and part.startswith(b'.'):
                part = part[1:]
            fresh = part.endswith(b'\r\n')
            parts.append(part[:-2] + b'\n' if fresh else part)


class _Closed(Exception):
    pass


# ---------------------------------------------------------------------------
# Mailman 3.

_MAILMAN_CFG = """\
[mailman]
site_owner: site-owner@{domain}
layout: private

[paths.private]
var_dir: {folder}/var
bin_dir: {bin}

[mta]
incoming: mailman.mta.null.NullMTA
outgoing: mailman.mta.deliver.deliver
smtp_host: {mta_host}
smtp_port: {mta_port}
lmtp_host: 127.0.0.1
lmtp_port: {port}

[webservice]
hostname: 127.0.0.1
port: {rest_port}
admin_user: {user}
admin_pass: {password}
workers: 1

[database]
class: mailman.database.sqlite.SQLiteDatabase
url: sqlite:///{folder}/var/data/mailman.db

[archiver.prototype]
enable: no
[archiver.mhonarc]
enable: no
[archiver.mail_archive]
enable: no
"""

# Only what a post and a command need: each one is a process of its own.
_MAILMAN_RUN = ('in', 'pipeline', 'out', 'virgin', 'command', 'bounces',
                'lmtp', 'rest')
_MAILMAN_OFF = ('archive', 'nntp', 'retry', 'task', 'digest')


class Mailman(Server):
    """A Mailman 3 with the domain list.example.test and two lists in it.

    port       where its LMTP service listens
    lists_dir  its folder of lists, one folder for each: dev.list.example.test
    LISTS      the lists' names, each with its two subscribers
    OWNER      who owns both lists

    What it sends goes to the server at `mta`, a (host, port) pair.
    """

    DOMAIN = 'list.example.test'
    LISTS = {
        'dev': ('first@subscriber.example.test',
                'second@subscriber.example.test'),
        'my-list': ('third@subscriber.example.test',
                    'fourth@subscriber.example.test'),
    }
    OWNER = 'owner@subscriber.example.test'
    _PASSWORD = 'restpass'

    def __init__(self, mta, port=None):
        self.bin = '/usr/lib/mailman3/bin'
        if not os.path.exists(self.bin + '/master'):
            raise MissingTool('Mailman 3 (Debian package mailman3)')
        need_root('Mailman')
        super().__init__(port)
        self.rest_port = free_port()
        os.mkdir(self.path('var'))
        text = _MAILMAN_CFG.format(
            domain=self.DOMAIN, folder=self.folder, bin=self.bin,
            mta_host=mta[0], mta_port=mta[1], port=self.port,
            rest_port=self.rest_port, user='restadmin',
            password=self._PASSWORD)
        for name in _MAILMAN_RUN:
            text += '[runner.%s]\nsleep_time: 0.1s\n' % name
        for name in _MAILMAN_OFF:
            text += '[runner.%s]\nstart: no\n' % name
        self.cfg = self.write('mailman.cfg', text)
        self.lists_dir = self.path('var', 'lists')
        self.log = self.path('var', 'logs', 'mailman.log')
        self.configured = False

    def start(self):
        with open(self.path('output'), 'ab') as output:
            self.process = subprocess.Popen(
                [self.bin + '/master', '-C', self.cfg, '--force'],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                cwd=self.folder,
                env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin',
                     'LANG': 'C.UTF-8', 'HOME': self.folder})

        def rest_answers():
            if self.process.poll() is not None:
                raise RuntimeError('Mailman ended with status %s%s' % (
                    self.process.returncode, tail(self.path('output'))))
            try:
                return self.rest('system/versions')
            except (OSError, ValueError):
                return None
        try:
            wait_until(rest_answers, 60, 'Mailman\'s REST service')
        except TimeoutError as e:
            raise RuntimeError('%s%s' % (e, tail(self.path('output'))))
        wait_for_greeting(self.port, self.process, 60, self.path('output'))
        if not self.configured:
            self._configure()
            self.configured = True

    def rest(self, path, data=None, method=None):
        """One call of the REST service: the decoded answer, or {}."""
        request = urllib.request.Request(
            'http://%s:%d/3.1/%s' % (HOST, self.rest_port, path),
            data=None if data is None
            else urllib.parse.urlencode(data).encode(),
            method=method)
        request.add_header('Authorization', 'Basic ' + base64.b64encode(
            b'restadmin:' + self._PASSWORD.encode()).decode())
        with urllib.request.urlopen(request, timeout=30) as response:
            body = response.read()
        return json.loads(body) if body else {'status': response.status}

    def _configure(self):
        self.rest('domains', {'mail_host': self.DOMAIN})
        for name, subscribers in self.LISTS.items():
            self.rest('lists',
                      {'fqdn_listname': '%s@%s' % (name, self.DOMAIN)})
            list_id = '%s.%s' % (name, self.DOMAIN)
            self.rest('lists/%s/config' % list_id, {
                'default_member_action': 'accept',
                'default_nonmember_action': 'accept',
                'send_welcome_message': 'False',
                'max_message_size': '0',
                'require_explicit_destination': 'False',
            }, 'PATCH')
            for address in subscribers:
                self.rest('members', {
                    'list_id': list_id, 'subscriber': address,
                    'pre_verified': 'True', 'pre_confirmed': 'True',
                    'pre_approved': 'True', 'send_welcome_message': 'False'})
            self.rest('members', {
                'list_id': list_id, 'subscriber': self.OWNER, 'role': 'owner',
                'pre_verified': 'True', 'pre_confirmed': 'True',
                'pre_approved': 'True'})


if __name__ == '__main__':
    sys.exit('This module is imported by the tests; it does nothing itself.')

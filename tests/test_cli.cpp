// The program: its command line, its signals, its privileges, its output. It runs as a process of its own:
// ./smtpd in the working directory, or $SMTPD_PROGRAM.

#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <pwd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <utility>
#include <vector>

#include "asyncore.hpp"
#include "loopback.hpp"
#include "smtpd.hpp"
#include "test.hpp"

namespace {

using strings = std::vector<std::string>;
using clock = asyncore::clock;
using asyncore::socket_type;

constexpr std::chrono::seconds patience{10};   // for what should happen at once

const std::string BANNER_VERSION(smtpd::version);
const std::string SHUTTING_DOWN = "421 Error: server is shutting down\r\n";

bool ready(int fd, short events, int milliseconds) {
    pollfd it{fd, events, 0};
    return ::poll(&it, 1, milliseconds) > 0;
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

// The lines of a text, without their ends.
strings lines(const std::string& text) {
    strings result;
    for (std::istringstream in(text); std::getline(in, result.emplace_back());) continue;
    result.pop_back();
    return result;
}

// ---------------------------------------------------------------------------------------------------------
// The program
// ---------------------------------------------------------------------------------------------------------

// The program's stdout and stderr: pipes, or what the shell writes as >&- and >/dev/full.
enum class out_to { pipe, nowhere, full };

class program {
  public:
    std::string out, err;   // what it has written so far

    // Before it runs the program, the child calls prepare(): what that returns false for ends with 126.
    explicit program(strings args, out_to where = out_to::pipe, bool (*prepare)() = nullptr) {
        const char* path = std::getenv("SMTPD_PROGRAM");
        args.insert(args.begin(), path && *path ? path : "./smtpd");
        std::vector<char*> argv;
        for (auto& arg : args) argv.push_back(&arg[0]);
        argv.push_back(nullptr);
        int pipes[2][2];
        for (auto& pipe : pipes) {
            if (::pipe(pipe) < 0) throw std::runtime_error("pipe");
            for (const int end : pipe) ::fcntl(end, F_SETFD, FD_CLOEXEC);
        }
        pid_ = ::fork();
        if (pid_ < 0) throw std::runtime_error("fork");
        if (pid_ == 0) {
            ::dup2(pipes[0][1], 1);
            ::dup2(pipes[1][1], 2);
            if (where == out_to::nowhere) ::close(1);
            if (where == out_to::full) ::dup2(::open("/dev/full", O_WRONLY), 1);
            if (prepare && !prepare()) ::_exit(126);
            ::execv(argv[0], argv.data());
            ::_exit(127);
        }
        for (int i = 0; i < 2; ++i) {
            ::close(pipes[i][1]);
            from_[i] = socket_type(pipes[i][0]);
            ::fcntl(pipes[i][0], F_SETFL, O_NONBLOCK);
        }
    }

    // Asks it to end; makes it end.
    ~program() {
        for (int i = 0; i < 1000 && running(); ++i) {
            if (i == 0) ::kill(pid_, SIGTERM);
            ::poll(nullptr, 0, 1);
        }
        if (ended_) return;
        ::kill(pid_, SIGKILL);
        ::waitpid(pid_, &status_, 0);
    }
    program(const program&) = delete;
    program& operator=(const program&) = delete;

    pid_t pid() const { return pid_; }
    void signal(int number) { ::kill(pid_, number); }

    // Nobody reads its stdout any more.
    void close_stdout() { from_[0].close(); }

    bool running() { return !ended_ && !(ended_ = ::waitpid(pid_, &status_, WNOHANG) == pid_); }

    // Reads what it writes until done(), or the end; whether it was done.
    template <typename Condition>
    bool read_until(Condition done) {
        for (const auto end = clock::now() + patience; clock::now() < end;) {
            const bool last = !running();
            read(0, out);
            read(1, err);
            if (done()) return true;
            if (last) return false;
            ::poll(nullptr, 0, 1);
        }
        return false;
    }

    // Its exit status, when it has ended by itself; 1000 and the signal's number, when that has ended it.
    int wait() {
        read_until([] { return false; });
        if (!ended_) throw std::runtime_error("the program runs on; stderr: " + err);
        if (WIFEXITED(status_) && WEXITSTATUS(status_) == 127) throw std::runtime_error("there is no program to test");
        return WIFEXITED(status_) ? WEXITSTATUS(status_) : 1000 + WTERMSIG(status_);
    }

  private:
    void read(std::size_t which, std::string& text) {
        char buffer[4096];
        for (ssize_t n; from_[which].fileno() >= 0 && (n = ::read(from_[which].fileno(), buffer, sizeof buffer)) > 0;)
            text.append(buffer, static_cast<std::size_t>(n));
    }

    pid_t pid_ = -1;
    int status_ = 0;
    bool ended_ = false;
    socket_type from_[2];
};

// ---------------------------------------------------------------------------------------------------------
// Its clients
// ---------------------------------------------------------------------------------------------------------

// A port that is free, and none that the system gives to whoever asks for any: it must stay free for a moment.
int free_port(const std::string& host = support::loopback()) {
    static unsigned next = static_cast<unsigned>(::getpid()) * 101;
    for (int tries = 100;; --tries) {
        const auto addr = asyncore::getaddrinfo({host, static_cast<int>(10000 + next++ % 20000)}).front();
        try {
            socket_type(addr.family, SOCK_STREAM).bind(addr);
            return addr.port;
        } catch (const std::system_error&) {
            if (tries == 0) throw;
        }
    }
}

bool has_ipv6() {
    try {
        return free_port("::1") > 0;
    } catch (const std::system_error&) {
        return false;
    }
}

std::string at(int port, const std::string& host = support::loopback()) { return host + ":" + std::to_string(port); }

class client {
  public:
    explicit client(socket_type sock) : sock_(std::move(sock)) {}

    // Connects as soon as the program listens, and reads the banner.
    client(program& to, int port, const std::string& host = support::loopback()) {
        for (const auto end = clock::now() + patience; !connect(port, host); ::poll(nullptr, 0, 1))
            if (!to.running() || clock::now() > end) throw std::runtime_error("the program does not listen");
        const std::string banner = reply();
        CHECK_EQ(banner.substr(0, 4), "220 ");
        CHECK(contains(banner, " " + BANNER_VERSION + "\r\n"));
    }

    // One reply, all its lines; what has come before the end.
    std::string reply() {
        std::string result, line;
        do {
            line.clear();
            while (line.size() < 2 || line.compare(line.size() - 2, 2, "\r\n") != 0) {
                const std::string byte = receive(1);
                if (byte.empty()) return result + line;
                line += byte;
            }
            result += line;
        } while (line.size() > 3 && line[3] == '-');
        return result;
    }
    std::string say(const std::string& line) {
        send(line + "\r\n");
        return reply();
    }
    void send(const std::string& text) { CHECK_EQ(sock_.send(text), text.size()); }
    void expect_end() { CHECK_EQ(receive(1), ""); }

    // As far as DATA, for one recipient.
    void begin(const std::string& command = "DATA") {
        CHECK_EQ(say("EHLO client").substr(0, 4), "250-");
        CHECK_EQ(say("MAIL FROM:<a@example.com>"), "250 OK\r\n");
        CHECK_EQ(say("RCPT TO:<b@example.com>"), "250 OK\r\n");
        CHECK_EQ(say(command).substr(0, 4), "354 ");
    }

  private:
    bool connect(int port, const std::string& host) {
        const auto addr = asyncore::getaddrinfo({host, port}).front();
        sock_ = socket_type(addr.family, SOCK_STREAM);
        sock_.connect_ex(addr);
        return ready(sock_.fileno(), POLLOUT, 5000) && sock_.getsockopt(SOL_SOCKET, SO_ERROR) == 0;
    }
    std::string receive(std::size_t most) {
        if (!ready(sock_.fileno(), POLLIN, 10000)) throw std::runtime_error("no reply from the program in ten seconds");
        std::string result(most, '\0');
        try {
            result.resize(sock_.recv(&result[0], most));
        } catch (const std::system_error&) {
            result.clear();   // reset
        }
        return result;
    }

    socket_type sock_;
};

// The program with a class that prints, and the port that it listens on.
struct server {
    int port = free_port();
    program it;

    explicit server(strings with = {}, out_to where = out_to::pipe, bool (*prepare)() = nullptr)
        : it(arguments(std::move(with)), where, prepare) {}

    client connect() { return client(it, port); }
    strings arguments(strings with) const {
        with.insert(with.begin(), {"-n", "-c", "DebuggingServer"});
        with.push_back(at(port));
        return with;
    }
};

// ---------------------------------------------------------------------------------------------------------
// The command line
// ---------------------------------------------------------------------------------------------------------

// It ends with 1, says nothing on stdout, and on stderr one line that names the mistake.
void check_mistake(const strings& args, const std::string& what) {
    program it(args);
    CHECK_EQ(it.wait(), 1);
    CHECK_EQ(it.out, "");
    const strings told = lines(it.err);
    CHECK_EQ(told.size(), std::size_t(1));
    const std::size_t name = told[0].find(": ");   // of the program
    CHECK_EQ(told[0].substr(name == std::string::npos ? 0 : name + 2), what + "; -h tells the options");
}

}   // namespace

TEST(cli, help) {
    for (const strings& args : {strings{"-h"}, {"--help"}, {"--h"}, {"-nh", "more"}, {"-h", "-s", "x"}}) {
        program it(args);
        CHECK_EQ(it.wait(), 0);
        CHECK_EQ(it.out, "");
        CHECK(contains(it.err, "smtpd [options] [localhost:localport [remotehost:remoteport]]\n"));
        for (const char* part : {"-n, --nosetuid", "-V, --version", "-c, --class", "-s, --size", "-u, --smtputf8",
                                 "-d, --debug", "-h, --help", "DebuggingServer", "PureProxy", "MailmanProxy"})
            CHECK(contains(it.err, part));
        CHECK_EQ(lines(it.err).back(), "Version: " + BANNER_VERSION);
        CHECK(!contains(it.err, "%"));
    }
}

TEST(cli, version) {
    for (const strings& args : {strings{"-V"}, {"--version"}, {"--vers"}, {"-nV"}, {"-V", "-h"}, {"-V", "-s", "x"}}) {
        program it(args);
        CHECK_EQ(it.wait(), 0);
        CHECK_EQ(it.out, BANNER_VERSION + "\n");
        CHECK_EQ(it.err, "");
    }
}

TEST(cli, getopt) {
    const std::pair<strings, std::string> table[] = {
        {{"-x"}, "option -x not recognized"},
        {{"-nx"}, "option -x not recognized"},
        {{"-n", "-V", "-x"}, "option -x not recognized"},   // all are read before the first one counts
        {{"-\x01"}, "option -\x01 not recognized"},         // options without a letter can't be had by one
        {{"--bogus"}, "option --bogus not recognized"},
        {{"--classes"}, "option --classes not recognized"},
        {{"-c"}, "option -c requires argument"},
        {{"-nc"}, "option -c requires argument"},
        {{"-s"}, "option -s requires argument"},
        {{"--class"}, "option --class requires argument"},
        {{"--si"}, "option --size requires argument"},
        {{"--mailman-lists"}, "option --mailman-lists requires argument"},
        {{"--s"}, "option --s not a unique prefix"},
        {{"--mailman-l"}, "option --mailman-l not a unique prefix"},
        {{"--=x"}, "option -- not a unique prefix"},
        {{"--version=1"}, "option --version must not have an argument"},
        {{"--n=3"}, "option --nosetuid must not have an argument"},
        {{"--help="}, "option --help must not have an argument"}};
    for (const auto& [args, what] : table) check_mistake(args, what);
}

// Deviation 62
TEST(cli, arguments) {
    const std::pair<strings, std::string> table[] = {
        {{"a", "b", "c"}, "Invalid arguments: a, b, c"},
        {{"-n", "a:1", "b:2", "c:3", "-d"}, "Invalid arguments: a:1, b:2, c:3, -d"},
        {{"-n", "somewhere"}, "Bad local spec: somewhere"},
        {{"-n", ""}, "Bad local spec: "},
        {{"-n", "-"}, "Bad local spec: -"},
        {{"-n", "--", "-h"}, "Bad local spec: -h"},
        {{"-n", "a:b"}, "Bad local port: a:b"},
        {{"-n", "a:"}, "Bad local port: a:"},
        {{"-n", "a:1:2"}, "Bad local port: a:1:2"},
        {{"-n", "a:65536"}, "Bad local port: a:65536"},
        {{"-n", "a:99999999999999999999"}, "Bad local port: a:99999999999999999999"},
        {{"-n", "a:-1"}, "Bad local port: a:-1"},
        {{"-n", "a:+1"}, "Bad local port: a:+1"},
        {{"-n", "a: 1"}, "Bad local port: a: 1"},
        {{"-n", "::1:25"}, "Bad local port: ::1:25"},
        {{"-n", "[::1]:x"}, "Bad local port: [::1]:x"},
        {{"-n", "[::1]"}, "Bad local port: [::1]"},
        {{"-n", "a:1", "b"}, "Bad remote spec: b"},
        {{"-n", "a:1", "b:x"}, "Bad remote port: b:x"},
        {{"-n", "a:1", "[::1]:70000"}, "Bad remote port: [::1]:70000"},
        {{"--mailman-lmtp", "here"}, "Bad LMTP spec: here"},
        {{"--mailman-lmtp=here:x"}, "Bad LMTP port: here:x"}};
    for (const auto& [args, what] : table) check_mistake(args, what);
}

// Deviation 29
TEST(cli, invalid_size) {
    for (const std::string size : {"x", "", "-5", "+5", "1k", "1.5", " 1", "0x10", "1_000", "99999999999999999999"}) {
        check_mistake({"-s", size}, "Invalid size: " + size);
        check_mistake({"--size=" + size, "-V"}, "Invalid size: " + size);
    }
}

// Deviation 31
TEST(cli, one_line_for_what_fails) {
    program unknown({"-n", "-c", "NoSuchServer", at(free_port())});
    CHECK_EQ(unknown.wait(), 1);
    CHECK_EQ(unknown.out, "");
    CHECK_EQ(lines(unknown.err).size(), std::size_t(1));
    CHECK(contains(unknown.err, ": there is no class NoSuchServer; "));

    socket_type taken(AF_INET, SOCK_STREAM);
    taken.bind(asyncore::getaddrinfo({support::loopback(), 0}).front());
    taken.listen(1);
    const std::string where = at(taken.getsockname().port);
    for (const std::string& place : {where, std::string("192.0.2.1:2525")}) {
        program it({"-n", "-c", "DebuggingServer", place});
        CHECK_EQ(it.wait(), 1);
        CHECK_EQ(it.out, "");
        CHECK_EQ(lines(it.err).size(), std::size_t(1));
        CHECK(contains(it.err, ": cannot listen on " + place + ": "));
    }
}

// Deviation 31
TEST(cli, ipv6) {
    if (!has_ipv6()) SKIP("no IPv6");
    const int port = free_port("::1");
    program it({"-n", "-c", "DebuggingServer", at(port, "[::1]")});
    client from(it, port, "::1");
    from.begin();
    CHECK_EQ(from.say("\r\nhello\r\n."), "250 OK\r\n");
    CHECK(it.read_until([&] { return contains(it.out, "X-Peer: ::1\n\nhello\n"); }));
    it.signal(SIGTERM);
    CHECK_EQ(it.wait(), 0);
}

// Deviation 29
TEST(cli, defaults) {
    program it({"-n", "-c", "DebuggingServer", "-d"});
    // The port may be taken here; then the complaint names it.
    CHECK(it.read_until([&] {
        return contains(it.err, "\tLocal addr: ('localhost', 8025)\n\tRemote addr:('localhost', 25)\n") ||
               contains(it.err, ": cannot listen on localhost:8025: ");
    }));
}

TEST(cli, class_names) {
    for (const strings& with : {strings{"-nc", "DebuggingServer"},
                                {"-ncDebuggingServer"},
                                {"--nosetuid", "--class=DebuggingServer"},
                                {"--n", "--cl", "DebuggingServer"},
                                {"-c", "NoSuchServer", "-n", "-c", "DebuggingServer", "--"}}) {
        const int port = free_port();
        strings args = with;
        args.push_back(at(port));
        program it(args);
        client from(it, port);
        CHECK_EQ(from.say("NOOP"), "250 OK\r\n");
    }
}

// Deviation 29
TEST(cli, size) {
    const auto offer = [](const strings& with) {
        server it(with);
        const std::string offered = it.connect().say("EHLO client");
        const std::size_t from = offered.find("\r\n") + 2;
        return offered.substr(from);
    };
    CHECK_EQ(offer({}), "250-SIZE 33554432\r\n250-8BITMIME\r\n250 HELP\r\n");
    CHECK_EQ(offer({"-s", "0"}), "250-8BITMIME\r\n250 HELP\r\n");
    CHECK_EQ(offer({"-s1000"}), "250-SIZE 1000\r\n250-8BITMIME\r\n250 HELP\r\n");
    CHECK_EQ(offer({"--size", "007"}), "250-SIZE 7\r\n250-8BITMIME\r\n250 HELP\r\n");
    CHECK_EQ(offer({"-u"}), "250-SIZE 33554432\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n250 HELP\r\n");
    CHECK_EQ(offer({"--smtp", "--si=1"}), "250-SIZE 1\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n250 HELP\r\n");

    server it({"-s", "10"});
    client from = it.connect();
    from.begin();
    CHECK_EQ(from.say("hello, world\r\n."), "552 Error: Too much mail data\r\n");
    CHECK_EQ(from.say("MAIL FROM:<a@b> SIZE=11"), "552 Error: message size exceeds fixed maximum message size\r\n");
}

TEST(cli, mailman_options) {
    char folder[] = "/tmp/smtpd-lists-XXXXXX";
    CHECK(::mkdtemp(folder) != nullptr);
    const std::string list = std::string(folder) + "/team.example.com";
    const bool made = ::mkdir(list.c_str(), 0700) == 0;
    socket_type lmtp(AF_INET, SOCK_STREAM);
    lmtp.bind(asyncore::getaddrinfo({support::loopback(), 0}).front());
    lmtp.listen(1);
    const int port = free_port();
    program it({"-n", "-c", "MailmanProxy", "--mailman-lists", folder, "--mailman-lmtp=" + at(lmtp.getsockname().port),
                at(port), at(free_port())});
    client from(it, port);
    CHECK_EQ(from.say("EHLO client").substr(0, 4), "250-");
    CHECK_EQ(from.say("MAIL FROM:<a@example.com>"), "250 OK\r\n");
    from.send("RCPT TO:<team@example.com>\r\n");
    // The list is there, so the program turns to Mailman.
    CHECK(ready(lmtp.fileno(), POLLIN, 10000));
    client mailman(std::move(*lmtp.accept().first));
    CHECK_EQ(mailman.say("220 mailman").substr(0, 5), "LHLO ");
    ::rmdir(list.c_str());
    ::rmdir(folder);
    CHECK(made);
}

namespace {

// It ends with 1 and one line, which contains that.
void check_one_line(const strings& args, const std::string& part, bool (*prepare)() = nullptr) {
    program it(args, out_to::pipe, prepare);
    CHECK_EQ(it.wait(), 1);
    CHECK_EQ(it.out, "");
    CHECK_EQ(lines(it.err).size(), std::size_t(1));
    if (!contains(it.err, part)) throw test::failure("not " + part + ": " + it.err);
}

}   // namespace

// Deviation 49
TEST(cli, mailman_without_its_folder) {
    char folder[] = "/tmp/smtpd-lists-XXXXXX";
    CHECK(::mkdtemp(folder) != nullptr);   // which is 0700
    const std::string path = folder;
    const auto args = [](const std::string& lists) {
        return strings{"-n", "-c", "MailmanProxy", "--mailman-lists", lists, at(free_port()), at(free_port())};
    };
    check_one_line(args(path + "/none"), ": " + path + "/none: No such file");
    std::ofstream(path + "/file") << "not a folder";
    check_one_line(args(path + "/file"), ": " + path + "/file: Not a directory");
    ::unlink((path + "/file").c_str());
    const passwd* nobody = ::getpwnam("nobody");
    if (::geteuid() == 0 && nobody) {   // as root it could be read; as nobody it can't
        strings as_nobody = args(path);
        as_nobody.erase(as_nobody.begin());
        check_one_line(as_nobody, ": " + path + ": Permission denied");
    }
    ::rmdir(folder);
}

// Deviation 50
TEST(cli, a_proxy_that_would_send_to_itself) {
    const int port = free_port();
    const std::string itself = ": it would send to itself: ";
    check_one_line({"-n", at(port), at(port)}, itself + at(port));
    check_one_line({"-n", at(port, "localhost"), at(port, "localhost")}, itself);
    check_one_line({"-n", at(port, "0.0.0.0"), at(port)}, itself);
    check_one_line({"-n", "-c", "MailmanProxy", "--mailman-lists", ".", at(port), at(port)}, itself);
    check_one_line({"-n", "-c", "MailmanProxy", "--mailman-lists", ".", "--mailman-lmtp", at(port), at(port)}, itself);
    program it({"-n", "-c", "DebuggingServer", at(port), at(port)});   // which sends nothing
    CHECK_EQ(client(it, port).say("NOOP"), "250 OK\r\n");
}

// ---------------------------------------------------------------------------------------------------------
// What it prints
// ---------------------------------------------------------------------------------------------------------

// Deviation 24
TEST(cli, prints_messages) {
    server it;
    client from = it.connect();
    from.begin();
    from.send("Subject: \xc3\xa9t\xc3\xa9\x1b]0;title\x07\r\n\r\n\x1b[2J\xff\tback\b\x7f\xc2\x9b\r\n");
    CHECK_EQ(from.say("."), "250 OK\r\n");
    // It is there although the program runs on: nothing waits in a buffer.
    CHECK(it.it.read_until([&] { return contains(it.it.out, "END MESSAGE"); }));
    CHECK_EQ(it.it.out,
             "---------- MESSAGE FOLLOWS ----------\n"
             "Subject: \xc3\xa9t\xc3\xa9\\x1b]0;title\\x07\n"
             "X-Peer: 127.0.0.1\n"
             "\n"
             "\\x1b[2J\\xff\tback\\x08\\x7f\\xc2\\x9b\n"
             "------------ END MESSAGE ------------\n");
    it.it.signal(SIGTERM);
    CHECK_EQ(it.it.wait(), 0);
    CHECK_EQ(it.it.err, "");
}

// Deviation 26
TEST(cli, debug) {
    for (const char* option : {"-d", "--debug"}) {
        server it({option});
        client from = it.connect();
        from.say("HELO \x1b[31mred");
        from.say("NOOP \xc3\xa9\x7f\n\x07");
        from.say("MAIL FROM:<\x1b@example.com>");
        from.say("QUIT");
        it.it.signal(SIGTERM);
        CHECK_EQ(it.it.wait(), 0);
        const std::string& told = it.it.err;
        CHECK(contains(told, "SMTPServer started at "));
        CHECK(contains(told, "\n\tLocal addr: ('" + support::loopback() + "', " + std::to_string(it.port) + ")\n"));
        CHECK(contains(told, "\nIncoming connection from ('127.0.0.1', "));
        CHECK(contains(told, "\nPeer: ('127.0.0.1', "));
        CHECK(contains(told, "\nData: b'HELO \\x1b[31mred'\n"));
        CHECK(contains(told, "\nData: b'NOOP \\xc3\\xa9\\x7f\\n\\x07'\n"));
        CHECK(contains(told, "\nData: b'QUIT'\n"));
        for (const char byte : told) CHECK(byte == '\n' || byte == '\t' || (byte >= ' ' && byte < '\x7f'));
        CHECK_EQ(it.it.out, "");
    }
}

static void cannot_write_to(out_to where) {
    server it({}, where);
    client from = it.connect();
    if (where == out_to::pipe) it.it.close_stdout();
    from.begin();
    CHECK_EQ(from.say("\r\nhello\r\n."), "");   // not acknowledged
    CHECK_EQ(it.it.wait(), 1);
    CHECK_EQ(lines(it.it.err).size(), std::size_t(1));
    CHECK(contains(it.it.err, ": cannot write the message to stdout\n"));
}

// Deviation 25
TEST(cli, stdout_that_cannot_be_written_to) {
    cannot_write_to(out_to::pipe);
    cannot_write_to(out_to::nowhere);
}

TEST(cli, stdout_that_is_full) {
    if (::access("/dev/full", W_OK) != 0) SKIP("no /dev/full");
    cannot_write_to(out_to::full);
}

// ---------------------------------------------------------------------------------------------------------
// Its end
// ---------------------------------------------------------------------------------------------------------

// Deviation 32
TEST(cli, signal_when_idle) {
    for (const int number : {SIGINT, SIGTERM}) {
        server it;
        client silent = it.connect(), greeted = it.connect(), half = it.connect();
        CHECK_EQ(greeted.say("HELO client").substr(0, 4), "250 ");
        half.send("NOOP");   // not a command yet
        const auto start = clock::now();
        it.it.signal(number);
        for (client* from : {&silent, &greeted, &half}) {
            CHECK_EQ(from->reply(), SHUTTING_DOWN);
            from->expect_end();
        }
        CHECK_EQ(it.it.wait(), 0);
        CHECK(clock::now() - start < std::chrono::seconds(5));   // not the time that messages in hand may take
        CHECK_EQ(it.it.err, "");
    }
}

// Deviation 32
TEST(cli, signal_with_a_message_in_hand) {
    for (const int number : {SIGINT, SIGTERM}) {
        server it;
        client idle = it.connect(), sending = it.connect();
        sending.begin();
        sending.send("Subject: in hand\r\n\r\nfirst half");
        it.it.signal(number);
        CHECK_EQ(idle.reply(), SHUTTING_DOWN);   // it has heard the signal
        idle.expect_end();
        CHECK(it.it.running());
        CHECK_EQ(sending.say(", second half\r\n."), "250 OK\r\n");
        CHECK_EQ(sending.reply(), SHUTTING_DOWN);
        sending.expect_end();
        CHECK_EQ(it.it.wait(), 0);
        CHECK(contains(it.it.out, "\nfirst half, second half\n"));
        CHECK_EQ(it.it.err, "");
    }
}

// Deviation 32
TEST(cli, second_signal) {
    const int numbers[] = {SIGINT, SIGTERM};
    for (const int first : numbers)
        for (const int second : numbers) {
            server it;
            client idle = it.connect(), sending = it.connect();
            sending.begin();
            it.it.signal(first);
            CHECK_EQ(idle.reply(), SHUTTING_DOWN);
            it.it.signal(second);
            CHECK_EQ(it.it.wait(), 1000 + second);
            CHECK_EQ(sending.reply(), "");
        }
}

// Deviation 48
TEST(cli, a_listener_that_is_lost) {
#if defined(SYS_pidfd_open) && defined(SYS_pidfd_getfd)
    for (const bool in_hand : {false, true}) {
        server it;
        client sending = it.connect();
        if (in_hand) sending.begin();
        // Its listener is its first socket. It is shut down from outside: accept() gives EINVAL from then on.
        const int process = static_cast<int>(::syscall(SYS_pidfd_open, it.it.pid(), 0));
        bool found = false;
        for (int fd = 3; process >= 0 && fd < 20 && !found; ++fd) {
            socket_type copy(static_cast<int>(::syscall(SYS_pidfd_getfd, process, fd, 0)));
            int listens = 0;
            socklen_t size = sizeof listens;
            found = copy.fileno() >= 0 &&
                    ::getsockopt(copy.fileno(), SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) == 0 && listens &&
                    ::shutdown(copy.fileno(), SHUT_RDWR) == 0;
        }
        if (process >= 0) ::close(process);
        if (!found) return;   // this system does not let us
        if (in_hand) {        // a message in hand is taken
            sending.send("hello\r\n.\r\n");
            CHECK_EQ(sending.reply(), "250 OK\r\n");
        }
        CHECK_EQ(sending.reply(), SHUTTING_DOWN);
        CHECK_EQ(it.it.wait(), 1);
        CHECK_EQ(lines(it.it.err).size(), std::size_t(1));
        CHECK(contains(it.it.err, ": the listener on " + at(it.port) + " was closed by an error\n"));
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------
// Who it is
// ---------------------------------------------------------------------------------------------------------

namespace {

// Becomes a user who is neither root nor nobody.
bool become_somebody() {
    if (::geteuid() != 0) return true;
    const passwd* nobody = ::getpwnam("nobody");
    const uid_t somebody = nobody && nobody->pw_uid == 12345 ? 12346 : 12345;
    return ::setgroups(0, nullptr) == 0 && ::setgid(somebody) == 0 && ::setuid(somebody) == 0;
}

bool become_nobody() {
    const passwd* nobody = ::getpwnam("nobody");
    return nobody && ::setgroups(0, nullptr) == 0 && ::setgid(nobody->pw_gid) == 0 && ::setuid(nobody->pw_uid) == 0;
}

// root's groups, and one more.
bool join_a_group() {
    const gid_t groups[] = {0, 12345};
    return ::setgroups(2, groups) == 0;
}

// Whether a child that becomes somebody else may run the program at all.
bool runs_as(bool (*prepare)()) {
    program it({"-V"}, out_to::pipe, prepare);
    it.read_until([] { return false; });
    return it.out == BANNER_VERSION + "\n";
}

// The words after `name:` in /proc/PID/status.
strings status_of(pid_t pid, const std::string& name) {
    std::ifstream file("/proc/" + std::to_string(pid) + "/status");
    for (std::string line; std::getline(file, line);) {
        if (line.compare(0, name.size() + 1, name + ":") != 0) continue;
        std::istringstream in(line.substr(name.size() + 1));
        strings words;
        for (std::string word; in >> word;) words.push_back(word);
        return words;
    }
    return {};
}

}   // namespace

TEST(cli, setuid_takes_root) {
    const passwd* nobody = ::getpwnam("nobody");
    if (nobody && nobody->pw_uid == ::geteuid()) SKIP("this user is nobody already");
    if (!runs_as(become_somebody)) SKIP("the program lies where only this user can run it");
    program it({"-c", "DebuggingServer", at(free_port())}, out_to::pipe, become_somebody);
    CHECK_EQ(it.wait(), 1);
    CHECK_EQ(it.out, "");
    CHECK_EQ(lines(it.err + "\n").front(), "Cannot setuid \"nobody\"; try running with -n option.");
}

// Deviation 30
TEST(cli, setuid_leaves_nothing_of_root) {
    const passwd* nobody = ::getpwnam("nobody");
    if (::geteuid() != 0 || !nobody) SKIP("not root, or no user nobody");
    const int port = free_port();
    program it({"-c", "DebuggingServer", at(port)}, out_to::pipe, join_a_group);
    client from(it, port);
    CHECK_EQ(from.say("NOOP"), "250 OK\r\n");   // so it is past that
    if (const strings uids = status_of(it.pid(), "Uid"); !uids.empty()) {
        const std::string uid = std::to_string(nobody->pw_uid), gid = std::to_string(nobody->pw_gid);
        CHECK(uids == strings({uid, uid, uid, uid}));
        CHECK(status_of(it.pid(), "Gid") == strings({gid, gid, gid, gid}));
        CHECK(status_of(it.pid(), "Groups").empty());
    }
    it.signal(SIGTERM);
    CHECK_EQ(it.wait(), 0);
}

TEST(cli, nobody_needs_no_setuid) {
    if (::geteuid() != 0 || !runs_as(become_nobody)) SKIP("not root, or nobody can't run the program");
    const int port = free_port();
    program it({"-c", "DebuggingServer", at(port)}, out_to::pipe, become_nobody);
    client from(it, port);
    CHECK_EQ(from.say("NOOP"), "250 OK\r\n");
}

// Whether a program that listens there warns of being an open relay.
static bool warns(strings args, const std::string& host) {
    const int port = free_port();
    args.push_back(at(port, host));
    program it(args);
    client from(it, port, host[0] == '[' ? "::1" : "127.0.0.1");
    CHECK_EQ(from.say("NOOP"), "250 OK\r\n");
    it.signal(SIGTERM);
    CHECK_EQ(it.wait(), 0);
    if (it.err.empty()) return false;
    CHECK_EQ(lines(it.err).size(), std::size_t(1));
    CHECK(contains(it.err, ": warning: whoever can reach "));
    CHECK(contains(it.err, ":" + std::to_string(port) + " can send mail anywhere through it\n"));
    return true;
}

TEST(cli, open_relay_warning) {
    CHECK(warns({"-n"}, "0.0.0.0"));   // PureProxy, since no class is named
    CHECK(warns({"-n", "-c", "MailmanProxy", "--mailman-lists", "."}, "0.0.0.0"));
    CHECK(!warns({"-n", "-c", "DebuggingServer"}, "0.0.0.0"));
    CHECK(!warns({"-n"}, "127.0.0.1"));
    CHECK(!warns({"-n", "-c", "MailmanProxy", "--mailman-lists", "."}, "127.0.0.1"));
}

TEST(cli, open_relay_warning_with_ipv6) {
    if (!has_ipv6()) SKIP("no IPv6");
    CHECK(warns({"-n"}, "[::]"));
    CHECK(!warns({"-n"}, "[::1]"));
}

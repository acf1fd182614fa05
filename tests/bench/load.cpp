// load.cpp: a small SMTP load generator, for what smtp-source(1) cannot do or is too slow for.
//
//   load [options] host:port
//   load --wait-220 host:port -- command [argument ...]
//
//   -n count      messages to send in all (default 1000)
//   -c count      connections at a time (default 20)
//   -k            keep the connections: they are opened and say HELO before the time starts, and each carries
//                 its share of the messages; else a connection for each message
//   -s bytes      size of a message's text, its few header lines not counted (default 1024)
//   -r count      recipients of each message (default 1)
//   --ehlo        say EHLO; else HELO
//   --size        declare the size of the message in MAIL (implies --ehlo)
//   --pipeline    send MAIL, all RCPT and DATA at once (RFC 2920; implies --ehlo)
//   --idle count  first open that many more connections, and hold them while the messages go
//   --gate        print `ready`, wait for a line on standard input, send the messages, print the result,
//                 wait for a line again, then close: what the caller measures in between is the messages
//   --wait-220    start the command, and print the seconds until something at host:port greets with 220
//
// Every reply's code is checked; the first wrong one ends the program with status 1. The result is one line:
//   messages=N seconds=S rate=N/S connections=N replies=N bytes=N cpu=S
// A message has the lines that smtp-source sends, so that the two can be compared.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace {

using clock_type = std::chrono::steady_clock;

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "load: %s\n", what.c_str());
    std::exit(1);
}

[[noreturn]] void fail_errno(const char* what) { fail(std::string(what) + ": " + std::strerror(errno)); }

double seconds_since(clock_type::time_point start) {
    return std::chrono::duration<double>(clock_type::now() - start).count();
}

double own_cpu() {
    rusage u{};
    ::getrusage(RUSAGE_SELF, &u);
    const auto seconds = [](const timeval& t) {
        return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6;
    };
    return seconds(u.ru_utime) + seconds(u.ru_stime);
}

struct settings {
    std::size_t messages = 1000;
    std::size_t connections = 20;
    std::size_t size = 1024;
    std::size_t recipients = 1;
    std::size_t idle = 0;
    bool kept = false;
    bool ehlo = false;
    bool declare_size = false;
    bool pipeline = false;
    bool gate = false;
    bool wait_220 = false;
    sockaddr_in server{};
    char** command = nullptr;
};

// ---- Connecting --------------------------------------------------------------------------------------

// Opens connections; when the ports of one source address have run out it goes on with the next of 127/8.
class connector {
  public:
    explicit connector(const sockaddr_in& server) : server_(server) {}

    // A non-blocking socket, connected or about to be.
    int open() {
        for (int attempt = 0; attempt < 250; ++attempt) {
            const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
            if (fd < 0) fail_errno("socket");
            const int on = 1;
            ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
            if (host_ > 1) bind_source(fd);
            if (::connect(fd, reinterpret_cast<const sockaddr*>(&server_), sizeof server_) == 0 || errno == EINPROGRESS)
                return fd;
            if (errno != EADDRNOTAVAIL && errno != EADDRINUSE) fail_errno("connect");
            ::close(fd);
            host_ = host_ % 250 + 1;
        }
        fail("no free source port left");
    }

  private:
    void bind_source(int fd) const {
        const int on = 1;
        ::setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
        sockaddr_in source{};
        source.sin_family = AF_INET;
        source.sin_addr.s_addr = htonl(0x7f000000U + host_);
        if (::bind(fd, reinterpret_cast<sockaddr*>(&source), sizeof source) < 0) fail_errno("bind");
    }

    sockaddr_in server_;
    std::uint32_t host_ = 1;
};

// ---- What is sent ------------------------------------------------------------------------------------

struct script {
    std::string hello;
    std::string mail;
    std::vector<std::string> rcpt;
    std::string data = "DATA\r\n";
    std::string envelope;   // all of them in one, for --pipeline
    std::string body;
    std::string quit = "QUIT\r\n";
};

// smtp-source's message: a few headers, then lines of 80 with a digit in front, then the dot.
std::string make_body(std::size_t size) {
    std::string body =
        "From: <foo@localhost>\r\nTo: <foo@localhost>\r\nDate: Thu, 1 Jan 1970 00:00:00 +0000 (UTC)\r\n"
        "Message-Id: <0000.0000.0000@localhost>\r\n\r\n";
    body.reserve(body.size() + size + 8);
    for (std::size_t line = 0; size > 0; ++line) {
        const std::size_t n = std::min<std::size_t>(size, 80);
        if (n > 2) {
            body += static_cast<char>('0' + line % 10);
            body.append(n - 3, 'X');
        }
        body += "\r\n";
        size -= n;
    }
    return body + ".\r\n";
}

script make_script(const settings& s) {
    script t;
    t.body = make_body(s.size);
    t.hello = s.ehlo ? "EHLO localhost\r\n" : "HELO localhost\r\n";
    t.mail = "MAIL FROM:<foo@localhost>";
    if (s.declare_size) t.mail += " SIZE=" + std::to_string(t.body.size() - 3);
    t.mail += "\r\n";
    for (std::size_t i = 0; i < s.recipients; ++i)
        t.rcpt.push_back("RCPT TO:<" + (s.recipients > 1 ? std::to_string(i) : std::string()) + "foo@localhost>\r\n");
    t.envelope = t.mail;
    for (const std::string& line : t.rcpt) t.envelope += line;
    t.envelope += t.data;
    return t;
}

// ---- The sessions ------------------------------------------------------------------------------------

enum class step { greeting, hello, mail, rcpt, data, body, quit, closed };

const char* expected(step s) {
    switch (s) {
        case step::greeting:
            return "220";
        case step::data:
            return "354";
        case step::quit:
            return "221";
        default:
            return "250";
    }
}

struct session {
    int fd = -1;
    step at = step::greeting;
    std::size_t rcpt = 0;      // recipients answered so far
    std::string_view output;   // what the socket did not take yet
    std::string line;          // the start of a reply line that came in pieces
};

class load {
  public:
    explicit load(const settings& s) : settings_(s), script_(make_script(s)), connector_(s.server), input_(65536) {}

    void run() {
        hold_idle();
        if (settings_.kept) begin_sessions();
        go(parked_);
        gate("ready");
        const auto start = clock_type::now();
        const double cpu = own_cpu();
        if (settings_.kept)
            begin_messages();
        else
            begin_sessions();
        go(active_);
        const double took = seconds_since(start);
        std::printf("messages=%zu seconds=%.6f rate=%.1f connections=%zu replies=%zu bytes=%zu cpu=%.6f\n", done_, took,
                    static_cast<double>(done_) / took, opened_, replies_, bytes_, own_cpu() - cpu);
        gate(nullptr);
    }

  private:
    void gate(const char* text) const {
        if (text != nullptr && settings_.gate) std::puts(text);
        std::fflush(stdout);
        char line[16];
        if (settings_.gate && std::fgets(line, sizeof line, stdin) == nullptr) std::exit(1);
    }

    // Opens the idle connections, 50 at a time, and reads each one's greeting.
    void hold_idle() {
        std::vector<pollfd> waiting;
        std::size_t opened = 0;
        while (opened < settings_.idle || !waiting.empty()) {
            while (opened < settings_.idle && waiting.size() < 50) {
                waiting.push_back({connector_.open(), POLLIN, 0});
                ++opened;
            }
            if (::poll(waiting.data(), waiting.size(), 30000) <= 0) fail("no greeting for an idle connection");
            for (std::size_t i = waiting.size(); i-- > 0;) {
                if (waiting[i].revents == 0) continue;
                const ssize_t count = ::recv(waiting[i].fd, input_.data(), input_.size(), 0);
                if (count < 3 || std::string_view(input_.data(), 3) != "220")
                    fail("an idle connection was not greeted with 220");
                waiting.erase(waiting.begin() + static_cast<std::ptrdiff_t>(i));
            }
        }
    }

    void begin_sessions() {
        active_ = std::min(settings_.connections, settings_.messages);
        parked_ = settings_.kept ? active_ : 0;
        sessions_.resize(active_);
        polled_.resize(active_);
        for (std::size_t i = 0; i < sessions_.size(); ++i) begin_session(i);
    }

    void begin_messages() {
        for (std::size_t i = 0; i < sessions_.size(); ++i) begin_message(i);
    }

    // Serves the sessions until the count is down to 0.
    void go(const std::size_t& count) {
        while (count > 0) {
            if (::poll(polled_.data(), polled_.size(), 30000) <= 0) fail("the server does not answer");
            for (std::size_t i = 0; i < polled_.size(); ++i)
                if (polled_[i].revents != 0) event(i);
        }
    }

    void begin_session(std::size_t i) {
        session& s = sessions_[i];
        s.fd = connector_.open();
        s.at = step::greeting;
        s.line.clear();
        polled_[i] = {s.fd, POLLIN, 0};
        ++opened_;
    }

    void event(std::size_t i) {
        session& s = sessions_[i];
        if ((polled_[i].revents & POLLOUT) != 0) send(i, s.output);
        if ((polled_[i].revents & (POLLIN | POLLHUP | POLLERR)) == 0) return;
        const ssize_t count = ::recv(s.fd, input_.data(), input_.size(), 0);
        if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (count < 0) fail_errno("recv");
        if (count == 0) fail("the server closed the connection");
        received(i, {input_.data(), static_cast<std::size_t>(count)});
    }

    void received(std::size_t i, std::string_view in) {
        session& s = sessions_[i];
        while (!in.empty()) {
            const std::size_t lf = in.find('\n');
            if (lf == std::string_view::npos) {
                s.line += in;
                return;
            }
            std::string_view line = in.substr(0, lf + 1);
            in.remove_prefix(lf + 1);
            if (!s.line.empty()) {
                s.line += line;
                line = s.line;
            }
            reply_line(i, line);
            s.line.clear();
            if (s.at == step::closed) {
                next_session(i);
                return;
            }
        }
    }

    void reply_line(std::size_t i, std::string_view line) {
        session& s = sessions_[i];
        if (line.size() < 5 || line.substr(0, 3) != expected(s.at))
            fail("expected " + std::string(expected(s.at)) + ", the server said: " + std::string(line));
        if (line[3] == '-') return;
        ++replies_;
        advance(i);
    }

    // One whole reply has come: goes to the next step and sends what it needs.
    void advance(std::size_t i) {
        session& s = sessions_[i];
        const bool one_by_one = !settings_.pipeline;
        switch (s.at) {
            case step::greeting:
                s.at = step::hello;
                send(i, script_.hello);
                break;
            case step::hello:
                if (parked_ > 0)
                    --parked_;
                else
                    begin_message(i);
                break;
            case step::mail:
                s.at = step::rcpt;
                s.rcpt = 0;
                if (one_by_one) send(i, script_.rcpt[0]);
                break;
            case step::rcpt:
                if (++s.rcpt < script_.rcpt.size()) {
                    if (one_by_one) send(i, script_.rcpt[s.rcpt]);
                    break;
                }
                s.at = step::data;
                if (one_by_one) send(i, script_.data);
                break;
            case step::data:
                s.at = step::body;
                send(i, script_.body);
                break;
            case step::body:
                ++done_;
                if (settings_.kept && started_ < settings_.messages) {
                    begin_message(i);
                } else {
                    s.at = step::quit;
                    send(i, script_.quit);
                }
                break;
            case step::quit:
            case step::closed:
                s.at = step::closed;
                break;
        }
    }

    void begin_message(std::size_t i) {
        ++started_;
        sessions_[i].at = step::mail;
        send(i, settings_.pipeline ? script_.envelope : script_.mail);
    }

    void next_session(std::size_t i) {
        ::close(sessions_[i].fd);
        if (!settings_.kept && opened_ < settings_.messages) {
            begin_session(i);
            return;
        }
        polled_[i] = {-1, 0, 0};
        --active_;
    }

    void send(std::size_t i, std::string_view text) {
        session& s = sessions_[i];
        const ssize_t count = ::send(s.fd, text.data(), text.size(), MSG_NOSIGNAL);
        if (count < 0 && errno != EAGAIN && errno != EINTR) fail_errno("send");
        const auto sent = static_cast<std::size_t>(std::max<ssize_t>(count, 0));
        bytes_ += sent;
        s.output = text.substr(sent);
        polled_[i].events = static_cast<short>(s.output.empty() ? POLLIN : POLLIN | POLLOUT);
    }

    settings settings_;
    script script_;
    connector connector_;
    std::vector<char> input_;
    std::vector<session> sessions_;
    std::vector<pollfd> polled_;
    std::size_t active_ = 0;   // sessions not ended yet
    std::size_t parked_ = 0;   // kept sessions that are still to say HELO before the time starts
    std::size_t opened_ = 0;
    std::size_t started_ = 0;
    std::size_t done_ = 0;
    std::size_t replies_ = 0;
    std::size_t bytes_ = 0;
};

// ---- --wait-220 --------------------------------------------------------------------------------------

bool greeted(const sockaddr_in& server) {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const timeval limit{30, 0};
    ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    bool found = false;
    if (::connect(fd, reinterpret_cast<const sockaddr*>(&server), sizeof server) == 0) {
        char text[3];
        found = ::recv(fd, text, sizeof text, MSG_WAITALL) == 3 && std::string_view(text, 3) == "220";
        if (!found) fail("the greeting is not 220");
    }
    ::close(fd);
    return found;
}

void wait_220(const settings& s) {
    const auto start = clock_type::now();
    const pid_t child = ::fork();
    if (child < 0) fail_errno("fork");
    if (child == 0) {
        if (std::freopen("/dev/null", "w", stdout) == nullptr || std::freopen("/dev/null", "w", stderr) == nullptr)
            ::_exit(126);
        ::execvp(s.command[0], s.command);
        ::_exit(127);
    }
    while (!greeted(s.server)) {
        if (::waitpid(child, nullptr, WNOHANG) == child) fail("the command has ended");
        if (seconds_since(start) > 30) fail("no greeting");
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    std::printf("seconds=%.6f\n", seconds_since(start));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
}

// ---- The command line --------------------------------------------------------------------------------

[[noreturn]] void usage() {
    std::fputs(
        "usage: load [-n messages] [-c connections] [-k] [-s bytes] [-r recipients] [--ehlo] [--size]\n"
        "            [--pipeline] [--idle count] [--gate] host:port\n"
        "       load --wait-220 host:port -- command [argument ...]\n",
        stderr);
    std::exit(2);
}

sockaddr_in parse_address(const std::string& text) {
    const std::size_t colon = text.rfind(':');
    sockaddr_in where{};
    where.sin_family = AF_INET;
    if (colon == std::string::npos || ::inet_pton(AF_INET, text.substr(0, colon).c_str(), &where.sin_addr) != 1)
        usage();
    where.sin_port = htons(static_cast<std::uint16_t>(std::atoi(text.c_str() + colon + 1)));
    return where;
}

settings parse(int argc, char** argv) {
    settings s;
    for (int i = 1; i < argc; ++i) {
        const std::string_view arg = argv[i];
        const auto number = [&]() -> std::size_t {
            if (++i == argc) usage();
            return std::strtoul(argv[i], nullptr, 10);
        };
        if (arg == "-n")
            s.messages = number();
        else if (arg == "-c")
            s.connections = number();
        else if (arg == "-s")
            s.size = number();
        else if (arg == "-r")
            s.recipients = number();
        else if (arg == "--idle")
            s.idle = number();
        else if (arg == "-k")
            s.kept = true;
        else if (arg == "--ehlo")
            s.ehlo = true;
        else if (arg == "--size")
            s.ehlo = s.declare_size = true;
        else if (arg == "--pipeline")
            s.ehlo = s.pipeline = true;
        else if (arg == "--gate")
            s.gate = true;
        else if (arg == "--wait-220")
            s.wait_220 = true;
        else if (arg == "--") {
            s.command = argv + i + 1;
            break;
        } else if (arg[0] == '-')
            usage();
        else
            s.server = parse_address(argv[i]);
    }
    if (s.server.sin_port == 0 || s.recipients == 0 || s.wait_220 != (s.command != nullptr && s.command[0] != nullptr))
        usage();
    return s;
}

}   // namespace

int main(int argc, char** argv) {
    rlimit files{};
    ::getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &files);
    const settings s = parse(argc, argv);
    if (s.wait_220)
        wait_220(s);
    else
        load(s).run();
}

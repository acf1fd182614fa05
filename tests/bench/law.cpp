// law.cpp: what a client's bytes cost a server, for counts.py.
//
//   law [--time] CLASS [OPTION...] FOLDER < cases
//
//   CLASS     SMTPServer (takes each message and drops it), DebuggingServer, PureProxy, MailmanProxy
//   OPTION    SMTPUTF8, decode_data
//   FOLDER    of the lists; a@list.test is one of them
//   --time    processor time instead of a count: see below
//
// A case is a line: KIND PACKET FILE. The file is sent in packets of that many bytes, by one client over a socketpair:
// a `body` after 354, and it ends a message; `commands` after EHLO and MAIL; a `session` after
// nothing at all. What the proxies send goes to a server in this process that says yes to everything.
//
// Only passes of the server over what the client has sent run in law_pass(), so that callgrind can count them alone
// (--toggle-collect=law_pass), and each case is one call of law_case() (--dump-after=law_case). With --time, a line per
// case goes to stderr: the nanoseconds of the longest pass, and of copying the file twice.

#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "smtpd.hpp"

namespace {

using nanoseconds = std::chrono::nanoseconds;

asyncore::map_type server_map;
nanoseconds longest{0};

[[noreturn]] void give_up(const std::string& why) {
    std::cerr << "law: " << why << std::endl;
    std::_Exit(2);
}

struct dropping_server : smtpd::SMTPServer {
    using SMTPServer::SMTPServer;
    std::optional<std::string> process_message(const asyncore::address& /*peer*/, const std::string& /*mailfrom*/,
                                               const std::vector<std::string>& /*rcpttos*/, std::string&& data,
                                               const smtpd::message_options& /*kwargs*/) override {
        const std::string taken = std::move(data);
        return std::nullopt;
    }
};

// The next server: it says yes to everything, and costs nothing that is counted.
class upstream {
  public:
    upstream() : listener_(AF_INET, SOCK_STREAM) {
        listener_.bind({"127.0.0.1", 0});
        listener_.listen(100);
    }

    asyncore::address where() const { return listener_.getsockname(); }

    // What there is to do; whether there was anything.
    bool serve() {
        bool busy = false;
        for (auto pair = listener_.accept(); pair.first; pair = listener_.accept()) {
            sessions_.push_back({std::move(pair.first), "", "", 0, false});
            sessions_.back().sock->send("220 ready\r\n");
            busy = true;
        }
        for (auto& it : sessions_) {
            try {
                while (it.sock) {
                    const std::size_t size = it.sock->recv(buffer_.data(), buffer_.size());
                    busy = true;
                    if (size == 0)
                        it.sock.reset();
                    else
                        hear(it, std::string_view(buffer_.data(), size));
                }
            } catch (const std::system_error& error) {
                if (error.code().value() != EAGAIN && error.code().value() != EWOULDBLOCK) it.sock.reset();
            }
        }
        sessions_.erase(std::remove_if(sessions_.begin(), sessions_.end(), [](const auto& it) { return !it.sock; }),
                        sessions_.end());
        return busy;
    }

  private:
    struct session {
        std::unique_ptr<asyncore::socket_type> sock;
        std::string line, tail;   // of a command; the message's last five bytes
        std::size_t recipients;
        bool lmtp, in_data = false;
    };

    static void hear(session& it, std::string_view bytes) {
        if (it.in_data) {
            it.tail.append(bytes.substr(bytes.size() - std::min<std::size_t>(bytes.size(), 5)));
            if (it.tail.size() > 5) it.tail.erase(0, it.tail.size() - 5);
            if (it.tail != "\r\n.\r\n" && it.tail != ".\r\n") return;
            it.in_data = false;
            for (std::size_t i = it.lmtp ? it.recipients : 1; i > 0; --i) it.sock->send("250 OK\r\n");
            return;
        }
        it.line += bytes;
        std::string answer;
        for (std::size_t end; !it.in_data && (end = it.line.find("\r\n")) != it.line.npos; it.line.erase(0, end + 2)) {
            const std::string verb = it.line.substr(0, 4);
            if (verb == "LHLO") it.lmtp = true;
            if (verb == "MAIL") it.recipients = 0;
            if (verb == "RCPT") ++it.recipients;
            it.in_data = verb == "DATA";
            it.tail.clear();
            answer += it.in_data                         ? "354 go on\r\n"
                      : verb == "EHLO" || verb == "LHLO" ? "250-me\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n250 SIZE\r\n"
                                                         : "250 OK\r\n";
        }
        it.sock->send(answer);
    }

    asyncore::socket_type listener_;
    std::vector<session> sessions_;
    std::string buffer_ = std::string(1 << 20, '\0');
};

// The client's end of a conversation, and all that happens meanwhile.
class client {
  public:
    client(smtpd::SMTPServer& server, upstream& next) : next_(next) {
        int ends[2];
        if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) != 0) give_up("no socketpair");
        mine_ = asyncore::socket_type(ends[0]);
        mine_.setsockopt(SOL_SOCKET, SO_SNDBUF, 1 << 20);
        server.handle_accepted(std::make_unique<asyncore::socket_type>(ends[1]), {});
    }

    // Sends, and waits until nothing happens any more.
    template <typename Pass>
    void say(std::string_view bytes, std::size_t packet, Pass pass) {
        for (int idle = 0; idle < 4;) {
            bool busy = false;
            if (!bytes.empty()) {
                try {
                    bytes.remove_prefix(mine_.send(bytes.substr(0, packet)));
                    busy = true;
                } catch (const std::system_error& error) {
                    if (error.code().value() != EAGAIN) bytes = {};   // it has hung up
                }
            }
            pass();
            busy = next_.serve() || busy;
            busy = hear() || busy;
            idle = busy || !bytes.empty() ? 0 : idle + 1;
        }
    }

    std::string heard;   // the last bytes of it

  private:
    bool hear() {
        char buffer[65536];
        bool busy = false;
        try {
            while (const std::size_t size = mine_.recv(buffer, sizeof buffer)) {
                heard.append(buffer, size);
                if (heard.size() > 4096) heard.erase(0, heard.size() - 1024);
                busy = true;
            }
        } catch (const std::system_error&) {
            // nothing more
        }
        return busy;
    }

    asyncore::socket_type mine_;
    upstream& next_;
};

std::string read_file(const std::string& name) {
    std::ifstream in(name, std::ios::binary);
    if (!in) give_up("cannot read " + name);
    return {std::istreambuf_iterator<char>(in), {}};
}

// Of this thread's processor time: what else the machine does is no part of it, nor is waiting.
nanoseconds now() {
    timespec time{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return std::chrono::seconds(time.tv_sec) + nanoseconds(time.tv_nsec);
}

nanoseconds time_of_two_copies(const std::string& text) {
    const nanoseconds start = now();
    for (int i = 0; i < 2; ++i) {
        const std::string copy = text;
        asm volatile("" : : "r"(copy.data()) : "memory");
    }
    return now() - start;
}

}   // namespace

extern "C" {

__attribute__((noinline)) void law_pass() {
    const nanoseconds start = now();
    asyncore::poll(0.0, &server_map);
    longest = std::max(longest, now() - start);
}

__attribute__((noinline)) void law_case(client& from, const std::string& text, std::size_t packet) {
    from.say(text, packet, law_pass);
}
}

int main(int argc, char** argv) {
    std::vector<std::string> args(argv + 1, argv + argc);
    const bool timing = !args.empty() && args[0] == "--time";
    if (timing) args.erase(args.begin());
    if (args.size() < 2) give_up("CLASS and FOLDER are wanted");

    upstream next;
    smtpd::options options;
    options.map = &server_map;
    options.fqdn = "law.test";
    options.mailman_lists = args.back();
    options.mailman_lmtp = next.where();
    for (std::size_t i = 1; i + 1 < args.size(); ++i)
        (args[i] == "SMTPUTF8" ? options.enable_SMTPUTF8 : options.decode_data) = true;
    ::mkdir((args.back() + "/a.list.test").c_str(), 0755);

    std::unique_ptr<smtpd::SMTPServer> server;
    const asyncore::address here{"127.0.0.1", 0};
    if (args[0] == "SMTPServer")
        server = std::make_unique<dropping_server>(here, next.where(), options);
    else if (args[0] == "DebuggingServer")
        server = std::make_unique<smtpd::DebuggingServer>(here, next.where(), options);
    else if (args[0] == "PureProxy")
        server = std::make_unique<smtpd::PureProxy>(here, next.where(), options);
    else if (args[0] == "MailmanProxy")
        server = std::make_unique<smtpd::MailmanProxy>(here, next.where(), options);
    else
        give_up("no such class");

    const auto poll = [] { asyncore::poll(0.0, &server_map); };
    std::string kind, name;
    for (std::size_t packet; std::cin >> kind >> packet >> name;) {
        const std::string text = read_file(name);
        nanoseconds least = nanoseconds::max(), copies{0};
        for (int round = 0; round < (timing ? 3 : 1); ++round) {
            client it(*server, next);
            if (kind != "session") it.say("EHLO client.test\r\nMAIL FROM:<a@b.test>\r\n", 65536, poll);
            if (kind == "body") it.say("RCPT TO:<c@d.test>\r\nRCPT TO:<a@list.test>\r\nDATA\r\n", 65536, poll);
            it.heard.clear();
            longest = nanoseconds(0);
            law_case(it, text, packet);
            if (kind == "body" && it.heard.substr(0, 3) != "250" && it.heard.substr(0, 3) != "554")
                give_up(name + ": the message was not taken, but: " + it.heard);
            least = std::min(least, longest);
            copies = std::max(copies, time_of_two_copies(text));
        }
        poll();
        if (timing)
            std::fprintf(stderr, "%lld %lld\n", static_cast<long long>(least.count()),
                         static_cast<long long>(copies.count()));
    }
    return 0;
}
